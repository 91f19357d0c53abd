"""Checks of shapes and types while the tests run: `make shapes`.

jaxtyping puts `check` around every function of the package (see `--jaxtyping-packages`).
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as mypy has it
