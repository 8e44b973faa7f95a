# An image for GPU nodes: hymba-tune with DeepSpeed, and causal-conv1d, mamba-ssm and flash-attn built for its torch.
#
#   docker build --tag hymba-tune .          hours of compiling; needs no GPU
#   docker run --gpus all --ipc host --volume "$PWD:/workspace" hymba-tune hymba-tune doctor
#
# CUDA is that of the torch wheel which constraints.txt pins; change both together. What a run needs to know (HF_TOKEN)
# is given to `docker run`, never to the build.
ARG CUDA=13.0.1

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS torch
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/hymba-tune/
RUN python3 -m venv /opt/venv \
    && pip install --constraint /opt/hymba-tune/constraints.txt ninja packaging psutil setuptools torch wheel \
    && nvcc --version | grep "release $(python -c 'import torch; print(torch.version.cuda)'),"

# Each compiles against the torch that is there, and fetches no wheel that was built elsewhere.
FROM torch AS kernels
ARG MAX_JOBS=4
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100"
ENV CAUSAL_CONV1D_FORCE_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE NVCC_THREADS=2
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels causal-conv1d==1.7.0
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels mamba-ssm==2.3.2.post1
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels flash-attn==2.8.3.post2

# nvcc stays: DeepSpeed compiles some of its operations where they are first used.
FROM torch
COPY . /opt/hymba-tune
RUN --mount=from=kernels,source=/wheels,target=/wheels \
    pip install --constraint /opt/hymba-tune/constraints.txt /wheels/*.whl --editable "/opt/hymba-tune[eval,deepspeed]" \
    && python -c "import torch, causal_conv1d_cuda, flash_attn_2_cuda, selective_scan_cuda" \
    && useradd --create-home hymba
USER hymba
WORKDIR /workspace
CMD ["hymba-tune", "doctor"]
