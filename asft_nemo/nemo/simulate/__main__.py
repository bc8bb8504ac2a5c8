"""``python -m asft_nemo.nemo.simulate RUN CONFIG OUT``: a simulation in a process of its own.

RUN is a JSON file of settings (`asft_nemo.config.schema.to_dict`), CONFIG a Hugging Face config.json, OUT gets the figures as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from asft_nemo.config.schema import from_dict
from asft_nemo.model import model_spec
from asft_nemo.nemo.simulate.run import simulate


def main(run_file: str, config_file: str, out_file: str) -> None:
    """Simulates with Transformer Engine's stand-ins and writes the figures."""
    gc.freeze()  # what imports made is no garbage: looking through it takes half a second each time
    run = from_dict(json.loads(Path(run_file).read_text()))
    spec = model_spec(json.loads(Path(config_file).read_text()))
    Path(out_file).write_text(json.dumps(simulate(run, spec).as_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
