# mlcm_rl on NVIDIA GPUs, with DeepSpeed and quantised teachers. In the folder of the clone:
#   docker build -f docs/docker/cuda.Dockerfile -t mlcm-cuda .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" -w /data -u "$(id -u):$(id -g)" mlcm-cuda run sdxl_mlcm --launch zero2
# The base has a compiler, which ZeRO's optimiser on the CPU is built with at its first use. torch brings its own CUDA.
# Not built by this project, which has no container engine and no GPU.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/venv/bin:$PATH
COPY . /source
RUN python3 -m venv /venv \
 && pip install --no-cache-dir -c /source/constraints.txt torch setuptools wheel ninja \
 && pip install --no-cache-dir --no-build-isolation -c /source/constraints.txt "/source[deepspeed,quantised,kolors]" \
 && rm -rf /source
ENTRYPOINT ["mlcm"]
CMD ["doctor"]
