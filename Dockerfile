# radixgen's HTTP server, on port 8000 of the container:
#
#     docker build -t radixgen .                              for CPUs
#     docker build -t radixgen --build-arg TORCH=cu130 .      for NVIDIA GPUs: PyTorch's name of a CUDA version
#     docker run -p 127.0.0.1:8000:8000 -e RADIXGEN_API_KEY=... radixgen
#
# With GPUs, add `--gpus all`. `docker stop -t 40` lets open requests end. The volume /cache keeps the model and
# compiled code.
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
ENV RADIXGEN_CACHE=/cache/radixgen HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor
VOLUME /cache
EXPOSE 8000
# Python, as process 1, ignores SIGTERM until the server has started.
STOPSIGNAL SIGINT
ENTRYPOINT ["radixgen"]
CMD ["serve", "--host", "0.0.0.0"]
