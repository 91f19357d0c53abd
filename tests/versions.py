"""What older versions of libraries cannot do by themselves, and no code of ours can mend."""

import pytest
import transformers
from packaging.version import Version

OLD = Version(transformers.__version__) < Version("5.16")

# Its T5 gives NaN, unrouted too, for padding on the left in float64 and under autocast.
t5_on_the_left = pytest.mark.skipif(OLD, reason="T5 of transformers before 5.16")
# Its prompt lookup wants an end-of-sequence token.
guesses_without_end = pytest.mark.skipif(OLD, reason="prompt lookup of transformers before 5.16")
