# Images with the command `reclip`. Photographs and results are in /work, weights and caches in /cache:
#
#     docker build --tag reclip_d2 --target cpu .
#     docker build --tag reclip_d2:cuda --target cuda .       # kernels for CUDA_ARCHITECTURES
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume reclip-cache:/cache reclip_d2 \
#         segment photos --classes classes.txt --output out   # with --gpus all for reclip_d2:cuda
#
# Both install PyTorch from PyPI, which brings its CUDA libraries (3 GB of downloads; the environment takes 7 GB). The CPU
# image does without the kernels for GPUs.

# ---- CPU ----------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS python-cpu

FROM python-cpu AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/reclip
ENV PATH=/opt/reclip/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt /src/
COPY tools/install_pinned.sh /src/tools/
WORKDIR /src
# Versions and hashes are those of the tested environment.
RUN tools/install_pinned.sh python
COPY . /src
RUN pip install --no-build-isolation --no-deps . && python -m reclip_d2.install_detectron2

FROM python-cpu AS cpu
COPY --from=build-cpu /opt/reclip /opt/reclip
ENV PATH=/opt/reclip/bin:$PATH RECLIP_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache /work
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["reclip"]
CMD ["--help"]

# ---- CUDA ---------------------------------------------------------------------------------------------------------
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/reclip
ENV PATH=/opt/reclip/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt /src/
COPY tools/install_pinned.sh /src/tools/
WORKDIR /src
RUN tools/install_pinned.sh python
COPY . /src
ARG CUDA_ARCHITECTURES="7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
RUN FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES" pip install --no-build-isolation --no-deps . \
    && python -m reclip_d2.install_detectron2

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/reclip /opt/reclip
ENV PATH=/opt/reclip/bin:$PATH RECLIP_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache /work
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["reclip"]
CMD ["--help"]
