"""asft plan: memory and seconds of a run, before anything is started."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from asft_nemo.commands.output import DONE, MENDABLE, Add, answer


def add_plan(add: Add) -> None:
    """Adds the command."""
    plan = add("plan", _plan, "memory and seconds on GPUs, by arithmetic alone; layouts that fit")
    plan.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings, as for asft train")
    plan.add_argument(
        "--gpu",
        help="h100-80gb, h200, a100-80gb or a100-40gb (default: cluster.gpu, else what the recipe is made for)",
    )
    plan.add_argument(
        "--search", action="store_true", help="try other layouts: those that fit, and why the others do not"
    )
    plan.add_argument(
        "--simulate",
        action="store_true",
        help="build every stage without data, too, and count its bytes (minutes)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    from asft_nemo.config.load import compose
    from asft_nemo.config.recipes import recipe_gpu
    from asft_nemo.planner import search as layouts
    from asft_nemo.planner.gpus import gpu
    from asft_nemo.planner.plan import as_json, plan_of
    from asft_nemo.planner.published import spec_of_run
    from asft_nemo.planner.time import shape_of
    from asft_nemo.planner.totals import totals_of
    from asft_nemo.planner.words import in_words

    asked = None if arguments.gpu is None else gpu(arguments.gpu)
    run = compose(
        arguments.words,
        check_inputs=False,
        assumed={"model.path": _NO_PATH},
        shape_of=lambda run: shape_of(spec_of_run(run)),
    )
    spec = spec_of_run(run)
    plan = plan_of(run, spec, asked or gpu(run.cluster.gpu or recipe_gpu(run.recipe)))
    values, words = {**as_json(plan), "total": asdict(totals_of(plan))}, [in_words(plan)]
    if arguments.search:
        found = layouts.search(plan)
        values["layouts"] = layouts.as_json(found)
        words.append(layouts.in_words(found, most=_LAYOUTS_SHOWN))
    if arguments.simulate:
        from asft_nemo.commands.simulation import Job, simulated
        from asft_nemo.commands.simulation import in_words as simulation_in_words
        from asft_nemo.planner.precision import widths_of

        [values["simulation"]] = simulated([Job(run, spec, kernels=widths_of(run).kernels)])
        words.append(simulation_in_words(values["simulation"]))
    answer(arguments, values, "\n\n".join(words))
    return DONE if plan.fits else MENDABLE


_NO_PATH = "as published"
_LAYOUTS_SHOWN = 10
