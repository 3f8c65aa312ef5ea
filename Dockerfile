# The server. On a CPU, and on NVIDIA GPUs:
#   docker build -t slipstream .
#   docker build -t slipstream:cuda --target cuda .
#   docker run --rm -p 8000:8000 -v $PWD/engine:/engine:ro slipstream serve /engine --host 0.0.0.0
# An engine runs from a read-only mount; what is compiled on first use is kept in the volume /cache.
FROM python:3.12-slim-bookworm AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS server
RUN useradd --uid 1000 --create-home slipstream \
    && install --directory --owner slipstream /cache
ENV XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["slipstream"]
CMD ["--help"]

# Triton compiles, for every kernel, the C that calls it.
FROM server AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[cuda,hub]"
USER 1000

FROM server AS cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[hub]"
USER 1000
