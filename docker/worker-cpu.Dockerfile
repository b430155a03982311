# A worker on a CPU: ONNX Runtime, plain Python and echo.
# From the repository's root: docker build --file docker/worker-cpu.Dockerfile --tag taxiway/worker-cpu .
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/worker-cpu.txt /requirements.txt
# Where an index of your own needs it, the build gets pip's settings and authorities as secrets: docker/README.md.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=authorities \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home taxiway && install --directory --owner=taxiway --group=taxiway /cache
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY queues.yaml ./
COPY models models
COPY docker/check_worker.sh docker/
COPY taxiway taxiway
COPY tasks tasks
COPY broker broker
COPY workers workers
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TAXIWAY_CACHE=/cache \
    TAXIWAY_ALIVE=/tmp/alive \
    OMP_WAIT_POLICY=passive
# The build fails where a package is missing that the process imports.
RUN python -c "import workers.__main__, workers.celery_adapter.pool, workers.celery_adapter.consumer, workers.runtimes.onnx, workers.runtimes.python, kombu.transport.redis, celery.backends.redis"
USER 10001:10001
VOLUME /cache
# A worker is healthy once it beats, which is after its models are fetched, converted and loaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD ["sh", "docker/check_worker.sh"]
# The process itself, not a shell, so that SIGTERM reaches the worker and drains it.
ENTRYPOINT ["python", "-m", "workers"]
CMD ["--class", "cpu.batch", "--device", "cpu:0"]
