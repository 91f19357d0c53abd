// The page's only script. Whatever comes from the server or the user becomes text, never markup.

const EVERY = 5000; // milliseconds between two looks at the pool
const LISTED = 24; // experts in the legend of an answer
const NOT_READ = "nobody: an answer’s last token is not read again";
const HINT = "Point at a token, or tab to one and use the arrow keys, to see its expert.";

const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem("phatgoose-key") ?? "";
let served = "pool";
let experts = [];
let stop = null; // of the request under way
let timer = 0;

// -- small helpers ------------------------------------------------------------------------------

function make(tag, className = "", ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children); // texts become text nodes
  return made;
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // live regions repeat what is set
  $(id).hidden = !text;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

// An expert keeps its number and colour for as long as the page is open.
const numbers = new Map();
function numberOf(name) {
  if (!numbers.has(name)) numbers.set(name, numbers.size + 1);
  return numbers.get(name);
}

function hued(element, name) {
  if (name) {
    element.classList.add("hued");
    element.style.setProperty("--hue", Math.round((numberOf(name) * 137.508) % 360));
  }
  return element;
}

const chip = (name) => hued(make("span", "number", name ? `${numberOf(name)}` : "–"), name);
const called = (name) => name || "the base alone";

function bar(name, share) {
  const inner = hued(make("div"), name);
  inner.style.width = `${100 * share}%`;
  const outer = make("div", "bar", inner);
  outer.setAttribute("aria-hidden", "true"); // its number stands beside it
  return outer;
}

// -- the server ---------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const message = await said(reply);
  if (reply.status === 401) {
    askForKey();
    throw new Error(key ? "The server does not take this API key." : "The server wants an API key.");
  }
  throw new Error(`Error ${reply.status}: ${message}`);
}

async function said(reply) {
  const text = await reply.text();
  try {
    const { error } = JSON.parse(text);
    return error.message ?? error;
  } catch {
    return text || reply.statusText;
  }
}

function askForKey() {
  clearTimeout(timer);
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  sessionStorage.setItem("phatgoose-key", key);
  $("key").value = "";
  $("key-form").hidden = true;
  say("failure", "");
  $("prompt").focus();
  look();
});

// -- the pool -----------------------------------------------------------------------------------

async function look() {
  clearTimeout(timer);
  try {
    showPool(await (await call("v1/experts")).json());
    say("trouble", "");
  } catch (error) {
    say("trouble", error.message);
  }
  clearTimeout(timer);
  if ($("key-form").hidden) timer = setTimeout(look, EVERY);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if ($("key-form").hidden) look();
});

function showPool(pool) {
  served = pool.model;
  experts = pool.data;
  experts.forEach((expert) => numberOf(expert.id));
  $("served").textContent = served;
  const entropy = pool.entropy === null ? "" : ` · entropy ${pool.entropy.toFixed(2)} nats a token`;
  $("state").textContent =
    `${experts.length} of at most ${pool.capacity} experts · generation ${pool.generation}${entropy}`;
  const minutes = pool.window_seconds / 60;
  const idle = experts.every((expert) => !expert.tokens);
  $("window").textContent = !experts.length
    ? "The pool is empty: the base answers alone."
    : `Share of the tokens of the last ${minutes} minutes, by routing weight` + (idle ? ": none yet." : ".");
  $("experts").hidden = !experts.length;
  const sorted = [...experts].sort((a, b) => b.share - a.share || numberOf(a.id) - numberOf(b.id));
  $("experts").tBodies[0].replaceChildren(...sorted.map(row));
  offer();
}

function row(expert) {
  const cells = [
    [chip(expert.id)],
    [expert.id, bar(expert.id, expert.share)],
    ...[percent(expert.share), Math.round(expert.tokens), expert.rank, expert.modules].map((x) => [x]),
  ];
  return make("tr", "", ...cells.map((inside) => make("td", "", ...inside)));
}

// Experts to choose from; what was chosen stays so where it is still there.
let offered = null;
function offer() {
  const names = experts.map((expert) => expert.id);
  if (JSON.stringify(names) === offered) return;
  offered = JSON.stringify(names);
  const one = $("one").value;
  const some = new Set(ticked());
  $("one").replaceChildren(
    ...experts.map(({ id, model }) => {
      const option = make("option", "", id);
      option.value = model;
      return option;
    }),
  );
  if (experts.some((expert) => expert.model === one)) $("one").value = one;
  $("some-box").replaceChildren(
    ...names.map((name) => {
      const box = make("input");
      Object.assign(box, { type: "checkbox", value: name, checked: some.has(name) });
      return make("label", "", box, " ", chip(name), " ", name);
    }),
  );
}

const ticked = () => [...$("some-box").querySelectorAll("input:checked")].map((box) => box.value);
const way = () => $("ask").elements.way.value;

for (const radio of $("ask").elements.way) {
  radio.addEventListener("change", () => {
    $("one-box").hidden = way() !== "one";
    $("some-box").hidden = way() !== "some";
  });
}

// -- a request ----------------------------------------------------------------------------------

// Echo with log-probabilities is how a completion tells its tokens as texts, prompt first.
function request() {
  const body = {
    model: served,
    prompt: $("prompt").value,
    max_tokens: $("most").valueAsNumber,
    temperature: 0,
    echo: true,
    logprobs: 0,
    phatgoose: { routing: "tokens" },
  };
  if ($("stream").checked) Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  if (way() === "base") body.model = "base";
  if (way() === "one") body.model = $("one").value;
  if (way() === "some") body.phatgoose.allow = ticked();
  if (way() === "one" && !body.model) throw new Error("The pool has no expert to choose.");
  if (way() === "some" && !ticked().length) throw new Error("Tick at least one expert.");
  return body;
}

async function* parts(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice("data: ".length));
    }
  }
}

// A whole answer and a part of a stream look alike.
function gather(answer, part) {
  if (part.error) throw new Error(part.error.message ?? part.error);
  for (const choice of part.choices ?? []) {
    answer.text += choice.text;
    answer.tokens.push(...(choice.logprobs?.tokens ?? []));
  }
  answer.prompted = part.usage?.prompt_tokens ?? answer.prompted;
  answer.routing = part.phatgoose ?? answer.routing;
}

async function send() {
  const body = request();
  const answer = { prompt: body.prompt, text: "", tokens: [], prompted: 0, routing: null };
  $("result").hidden = false;
  $("legend-box").hidden = true;
  $("token").textContent = "";
  $("asked").textContent = body.prompt;
  $("answer").textContent = "";
  $("answer").ariaBusy = "true"; // read out once, when it is there
  const options = { method: "POST", body: JSON.stringify(body), signal: stop.signal };
  const reply = await call("v1/completions", options);
  if (body.stream) {
    for await (const part of parts(reply)) {
      gather(answer, part);
      $("answer").textContent = answer.text.slice(body.prompt.length);
    }
  } else {
    gather(answer, await reply.json());
  }
  show(answer);
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stop) return;
  stop = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("failure", "");
  try {
    await send();
  } catch (error) {
    say("failure", error.name === "AbortError" ? "Stopped." : error.message);
  }
  $("answer").ariaBusy = "false";
  const back = document.activeElement === $("stop") || document.activeElement === document.body;
  stop = null;
  $("stop").disabled = true;
  $("send").disabled = false;
  if (back) $("send").focus(); // a button that is disabled loses the keyboard
  if ($("key-form").hidden) look();
});

$("stop").addEventListener("click", () => stop?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

// -- an answer, token by token ------------------------------------------------------------------

function show({ prompt, prompted, routing, ...answer }) {
  const tokens = mended(answer.tokens, prompt, prompted);
  const names = routing?.tokens?.[0];
  if (!names) {
    if (prompted) $("answer").textContent = tokens.slice(prompted).join("");
    throw new Error(`Which experts served this is not known: ${routing?.error ?? "not told"}`);
  }
  const spans = tokens.map((token, at) =>
    tokenOf(token, names[at], at === 0 || at === prompted || names[at] !== names[at - 1]),
  );
  $("asked").replaceChildren(...spans.slice(0, prompted));
  $("answer").replaceChildren(...spans.slice(prompted));
  spans.forEach((span, at) => {
    const part = at < prompted ? `prompt token ${at + 1}` : `answer token ${at + 1 - prompted}`;
    const tell = () => {
      $("token").textContent = `${part}, ${JSON.stringify(tokens[at])}: ${span.title}`;
    };
    span.addEventListener("mouseenter", tell);
    span.addEventListener("focus", () => {
      spans.forEach((other) => (other.tabIndex = -1));
      span.tabIndex = 0; // where Tab comes back to
      tell();
    });
    span.addEventListener("keydown", (event) => {
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      spans[next]?.focus();
    });
  });
  if (spans.length) (spans[prompted] ?? spans[0]).tabIndex = 0;
  $("token").textContent = HINT;
  showShares(routing.shares);
}

function tokenOf(token, name, numbered) {
  const told = typeof name === "string";
  const span = make("span", told ? "token" : "token none", ...visible(token));
  span.tabIndex = -1;
  span.title = told ? called(name) : NOT_READ;
  if (!told) return span;
  if (numbered) {
    span.prepend(mark("sub", name ? `${numberOf(name)}` : "–")); // not by colour alone
  }
  return hued(span, name);
}

// Line breaks have an expert too, and so has a part of a letter, which comes as nothing: marks show them.
function visible(token) {
  if (!token) return [mark("i", "·")];
  return token.split(/(?=\n)/).flatMap((t) => (t[0] === "\n" ? [mark("i", "↵"), t] : [t]));
}

// vLLM has no text for a prompt that begins with a part of a letter; it is what the others leave.
function mended(tokens, prompt, prompted) {
  const rest = tokens.slice(1, prompted).join("");
  if (!tokens[0]?.includes("\ufffd") || !prompt.endsWith(rest)) return tokens;
  return [prompt.slice(0, prompt.length - rest.length), ...tokens.slice(1)];
}

function mark(tag, text) {
  const made = make(tag, "mark", text);
  made.setAttribute("aria-hidden", "true");
  return made;
}

function showShares(shares) {
  const sorted = Object.entries(shares).sort(([, a], [, b]) => b - a);
  const lines = sorted.slice(0, LISTED).map(([name, share]) => {
    const line = make("div", "line", chip(name), make("span", "name", called(name)), percent(share));
    return make("li", "", line, bar(name, share));
  });
  const rest = sorted.slice(LISTED);
  if (rest.length) {
    const sum = rest.reduce((total, [, share]) => total + share, 0);
    lines.push(make("li", "", `${rest.length} more: ${percent(sum)}`));
  }
  $("legend").replaceChildren(...lines);
  $("legend-box").hidden = false;
}

look();
