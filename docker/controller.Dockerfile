# The Kubernetes operator, which gives hardware classes their pods.
# From the repository's root: docker build --file docker/controller.Dockerfile --tag taxiway/controller .
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/controller.txt /requirements.txt
# Where an index of your own needs it, the build gets pip's settings and authorities as secrets: docker/README.md.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=authorities \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home taxiway
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY docker/check_http.py docker/
COPY taxiway taxiway
COPY controller controller
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TAXIWAY_LIVENESS=http://0.0.0.0:8080/healthz
# The build fails where a package is missing that the process imports.
RUN python -c "import controller.__main__"
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-I", "-S", "docker/check_http.py", "8080", "/healthz"]
ENTRYPOINT ["python", "-m", "controller"]
