# A worker on a TPU: JAX with libtpu.
# From the repository's root: docker build --file docker/worker-tpu.Dockerfile --tag taxiway/worker-tpu .
FROM python:3.11-slim-bookworm AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/worker-tpu.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home taxiway && install --directory --owner=taxiway --group=taxiway /cache
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY queues.yaml ./
COPY models models
COPY docker/check_worker.py docker/
COPY taxiway taxiway
COPY tasks tasks
COPY workers workers
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TAXIWAY_CACHE=/cache \
    JAX_PLATFORMS=tpu,cpu
USER 10001:10001
VOLUME /cache
# A worker is healthy once it beats, which is after its models are fetched, converted and loaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD ["python", "docker/check_worker.py"]
# The process itself, not a shell, so that SIGTERM reaches the worker and drains it.
ENTRYPOINT ["python", "-m", "workers"]
CMD ["--class", "tpu.bulk", "--device", "tpu:0"]
