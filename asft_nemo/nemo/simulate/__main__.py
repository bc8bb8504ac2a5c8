"""``python -m asft_nemo.nemo.simulate JOBS OUT``: simulations in a process of their own; `asft_nemo.commands.simulation` starts it.

JOBS is a JSON list of objects with ``run`` (`asft_nemo.config.schema.to_dict`), ``spec`` (the fields of `asft_nemo.model.ModelSpec`), ``kernels``
and ``trace``, the arguments of `simulate`; runs that build the same, such as an FP8 one and its bf16 twin, are simulated once. OUT gets the list of
results, or an object with ``error``, what the user can mend (exit code 2): a broken rule, or what Megatron refuses while it makes a config of
the settings.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace as replace_fields
from pathlib import Path

from asft_nemo.config.schema import from_dict, replace, to_dict
from asft_nemo.errors import UserError
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.simulate.run import bf16_twin, simulate


def main(jobs_file: str, out_file: str) -> int:
    """Simulates one job after the other. Returns the exit code."""
    gc.freeze()  # what imports made is no garbage: looking through it takes half a second each time
    done, known = [], {}
    try:
        for job in json.loads(Path(jobs_file).read_text()):
            run, spec = from_dict(job["run"]), ModelSpec(**job["spec"])
            twin, notes = bf16_twin(run)
            nameless = to_dict(replace(twin, {"recipe": "any", "run.dir": "any"}))
            built = json.dumps([nameless, job["spec"], job["kernels"], job["trace"]])
            if built not in known:
                known[built] = simulate(twin, spec, kernels=job["kernels"], trace_stages=job["trace"])
            done.append(replace_fields(known[built], notes=notes).as_dict())
    except UserError as error:
        Path(out_file).write_text(json.dumps({"error": str(error)}))
        return 2
    Path(out_file).write_text(json.dumps(done, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
