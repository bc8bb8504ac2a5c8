# asft_nemo on NVIDIA's NeMo container, for a Slurm cluster with pyxis/enroot or for plain Docker.
#
#   docker build -t asft_nemo .
#   docker build -t asft_nemo --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo:26.02 .
#   docker build -t asft_nemo_eval --target eval .
#
# 25.11 is NeMo 2.6.0, Megatron-core 0.15, Transformer Engine 2.9, ModelOpt 0.37; 26.02 is NeMo 2.7.0, Megatron-core 0.16,
# Transformer Engine 2.12 (NVIDIA's release notes). What was tried and what was not: docs/container.md.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
ARG EVAL_BASE_IMAGE=vllm/vllm-openai:v0.11.0

# Evaluation: the same tree over vLLM's image. Only the target `eval` builds it.
FROM ${EVAL_BASE_IMAGE} AS eval
ARG EVAL_PYTHON=python3
COPY . /opt/asft_nemo
WORKDIR /opt/asft_nemo
RUN PIP_CONSTRAINT="" "${EVAL_PYTHON}" -m pip install --no-cache-dir --no-deps --editable . \
    && "${EVAL_PYTHON}" -m compileall -q asft_nemo eval recipes \
    && chmod -R a+rX /opt/asft_nemo \
    && asft eval --help > /dev/null
WORKDIR /workspace
ENTRYPOINT ["/opt/asft_nemo/tools/container_entrypoint"]
CMD ["eval", "--help"]

FROM ${BASE_IMAGE} AS train
# The base's interpreter; give PYTHON=/opt/venv/bin/python or the like where `python` is not the one with NeMo in it.
ARG PYTHON=python
# conf/, recipes/ and assets/ are read beside the package, so the image keeps the tree and installs it in place.
COPY . /opt/asft_nemo
WORKDIR /opt/asft_nemo
# --no-deps: torch, Transformer Engine, Megatron-core and NeMo stay the base's own builds.
# PIP_CONSTRAINT is emptied because NGC images pin build tools in it that can be older than pyproject.toml asks for.
# Bytecode is written now and everything made readable: under pyxis the job runs as the user, on a read-only root.
RUN PIP_CONSTRAINT="" "${PYTHON}" -m pip install --no-cache-dir --no-deps --editable . \
    && "${PYTHON}" -m compileall -q asft_nemo eval recipes \
    && chmod -R a+rX /opt/asft_nemo \
    && asft --version
WORKDIR /workspace
# It hands over to NGC's own entrypoint, which sets up the driver's libraries under Docker; pyxis runs neither by default.
ENTRYPOINT ["/opt/asft_nemo/tools/container_entrypoint"]
CMD ["--help"]
