# radixgen's HTTP server, on port 8000 of the container:
#
#     docker build -t radixgen .                              for CPUs
#     docker build -t radixgen --build-arg TORCH=cu130 .      for NVIDIA GPUs: PyTorch's name of a CUDA version
#     docker run -p 127.0.0.1:8000:8000 -e RADIXGEN_API_KEY=... radixgen
#
# With GPUs, add `--gpus all`. The model and Numba's compiled code are kept in the volume /cache.
FROM python:3.12-slim

ARG TORCH=cpu

# Triton compiles its launchers with a C compiler.
# hadolint ignore=DL3008
RUN if [ "$TORCH" != cpu ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /src
RUN pip install --no-cache-dir "torch>=2.9,<=2.13" --index-url "https://download.pytorch.org/whl/$TORCH"

COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve,structured]" \
    && useradd --create-home --uid 1000 radixgen \
    && install -d -o radixgen /cache

USER 1000
WORKDIR /home/radixgen
ENV RADIXGEN_CACHE=/cache/radixgen NUMBA_CACHE_DIR=/cache/numba TRITON_CACHE_DIR=/cache/triton HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["radixgen"]
CMD ["serve", "--host", "0.0.0.0"]
