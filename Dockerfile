# asft_nemo on NVIDIA's NeMo container, for a Slurm cluster with pyxis/enroot or for plain Docker.
#
#   docker build -t asft_nemo .
#   docker build -t asft_nemo --build-arg BASE_IMAGE=registry.example.com/nemo:mine .
#
# 25.11 is the newest 25.x container and the one whose Megatron-core is of the 0.15 generation that this project is
# pinned to: PyTorch 2.9.0a0, Megatron-core 0.15.0 (dev), Transformer Engine 2.9, NeMo 2.6.0, ModelOpt 0.37.0 (NVIDIA's
# release notes). No listed container has the exact pair of requirements/base.txt (NeMo 2.7.3, Megatron-core 0.15.3).
# What was tried and what was not: docs/container.md.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

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

# No ENTRYPOINT of ours: pyxis ignores it by default, and NGC's own sets up the driver's libraries under Docker. So the
# command reads the same in both worlds: `srun --container-image=... asft train ...`, `docker run ... asft train ...`.
WORKDIR /workspace
CMD ["asft", "--help"]
