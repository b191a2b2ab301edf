# The service and its dashboard: no torch, no compiler.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
# The sources are mounted, not copied, and the cache keeps downloads between builds. Nothing that runs needs the
# libraries' own tests.
RUN --mount=type=bind,target=/src --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/brn \
    && /opt/brn/bin/pip install --disable-pip-version-check --constraint /src/constraints.txt '/src[serve]' \
    && find /opt/brn/lib -depth -type d -name tests -path '*/site-packages/*' -exec rm -rf {} +

FROM ${BASE}
LABEL org.opencontainers.image.title="brn-serve" \
      org.opencontainers.image.description="Diagnostics for batch normalization: service and dashboard" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/brn brn \
    && mkdir -p /var/lib/brn && chown brn:brn /var/lib/brn
COPY --from=build /opt/brn /opt/brn
ENV PATH=/opt/brn/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BRN_SERVICE_STORE=chdb:///var/lib/brn/store \
    BRN_SERVICE_HOST=0.0.0.0
USER brn
WORKDIR /var/lib/brn
VOLUME /var/lib/brn
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/readyz', timeout=2)"]
CMD ["brn-serve"]
