# Flower, the operators' page, with the fleet's own Celery.
# From the repository's root: docker build --file docker/flower.Dockerfile --tag taxiway/flower .
FROM python:3.11-slim-bookworm AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/requirements/flower.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --only-binary :all: --requirement /requirements.txt

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home taxiway
COPY --from=packages /opt/venv /opt/venv
COPY docker/check_http.py /app/docker/
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 5555
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "docker/check_http.py", "http://127.0.0.1:5555/healthcheck"]
ENTRYPOINT ["celery", "flower"]
CMD ["--address=0.0.0.0", "--port=5555", "--inspect_timeout=2000"]
