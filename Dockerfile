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
# The interpreter that has the base's packages; give /opt/venv/bin/python or the like where `python3` is another one.
ARG PYTHON=python3

# Evaluation: the same tree over vLLM's image. Only the target `eval` builds it.
FROM ${EVAL_BASE_IMAGE} AS eval
ARG PYTHON
COPY . /opt/asft_nemo
RUN /opt/asft_nemo/tools/container_install "${PYTHON}"
WORKDIR /workspace
ENTRYPOINT ["/opt/asft_nemo/tools/container_entrypoint"]
CMD ["eval", "--help"]

FROM ${BASE_IMAGE} AS train
ARG PYTHON
COPY . /opt/asft_nemo
RUN /opt/asft_nemo/tools/container_install "${PYTHON}"
WORKDIR /workspace
# It hands over to NGC's own entrypoint, which sets up the driver's libraries under Docker; pyxis runs neither by default.
ENTRYPOINT ["/opt/asft_nemo/tools/container_entrypoint"]
CMD ["--help"]
