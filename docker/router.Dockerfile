# The router: takes arrivals, serves HTTP, places. No model runtime is in it.
# From the repository's root: docker build --file docker/router.Dockerfile --tag taxiway/router .
FROM python:3.11-slim-bookworm AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/router.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home taxiway
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY queues.yaml ./
COPY models models
COPY docker/check_http.py docker/
COPY taxiway taxiway
COPY tasks tasks
COPY router router
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "docker/check_http.py", "http://127.0.0.1:8080/v2/health/live"]
ENTRYPOINT ["python", "-m", "router"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
