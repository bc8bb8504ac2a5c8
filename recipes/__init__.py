"""Recipes: one module per model and layout, values only.

`fragment()` gives the values, `finetune_recipe()` the same as a NeMo-Run task, `MODEL` the hub id of the model they are for, `GPU` the row of
`asft_nemo.planner.gpus` where it is not an H100 of 80 GB.

Names carry facts: `<model>_<full|lora>_<gpus>gpu_<gpu>[_fp8|_fp8_blockwise]`. A bare `<model>` is full fine-tuning in bf16 on H100.
"""
