"""GET /pool: a page for browsers, of three files that hold nothing of the pool.

Whoever reaches the server may load it; its script asks the same routes, with the same keys, as any
other client.
"""

from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"

# Only our own files run, only our own server is asked, and no other page may frame this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def _file(name: str, kind: str) -> Response:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response((FOLDER / name).read_bytes(), headers=headers, media_type=kind)


PAGE = {
    "/pool": _file("pool.html", "text/html"),
    "/pool/pool.css": _file("pool.css", "text/css"),
    "/pool/pool.js": _file("pool.js", "text/javascript"),
}
