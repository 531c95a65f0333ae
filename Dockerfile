# bigvision with CUDA: docker build -t bigvision .
#
#   docker run --gpus all --shm-size 8g -v "$PWD/photos:/data" -v "$PWD/runs:/runs" bigvision \
#       torchrun --nproc-per-node gpu -m bigvision.cli train --model.name vit_base_patch16_224 --data.train imagefolder:/data --out /runs/photos
#
# torch's wheels bring the CUDA libraries; the image adds nvcc's headers only through the base image's toolkit, which
# DeepSpeed needs to compile its offload optimizers at first use.
ARG CUDA=13.0.1-devel-ubuntu24.04
FROM nvidia/cuda:${CUDA}

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ openmpi-bin python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An unprivileged user: what a run writes into a mounted folder then does not belong to root.
RUN useradd --create-home --uid 10001 bigvision
ENV VIRTUAL_ENV=/opt/bigvision PATH=/opt/bigvision/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bigvision bigvision
COPY recipes recipes
COPY ds_configs ds_configs
RUN pip install --no-cache-dir -c constraints.txt ".[parquet]"

USER bigvision
WORKDIR /home/bigvision
CMD ["bigvision", "--help"]
