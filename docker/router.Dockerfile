# The router: takes arrivals, serves HTTP, places; and the tuner, which plans with the same code. No model runtime is in it.
# From the repository's root: docker build --file docker/router.Dockerfile --tag taxiway/router .
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/router.txt /requirements.txt
# Where an index of your own needs it, the build gets pip's settings and authorities as secrets: docker/README.md.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=authorities \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home taxiway
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY queues.yaml ./
COPY models models
COPY docker/check_http.py docker/
COPY taxiway taxiway
COPY tasks tasks
COPY broker broker
COPY router router
COPY api api
COPY simulator simulator
COPY controller/decide controller/decide
COPY workers workers
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# The build fails where a package is missing that the process imports.
RUN python -c "import router.__main__, api.__main__, simulator.tuning.command"
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-I", "-S", "docker/check_http.py", "8080", "/v2/health/live"]
ENTRYPOINT ["python", "-m", "api"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
