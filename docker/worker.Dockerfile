# The training worker. torch comes as the registry's default build, which brings its own CUDA libraries.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN python -m venv /opt/brn
WORKDIR /src
COPY . .
# The cache keeps downloads between builds and out of the image.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/brn/bin/pip install --disable-pip-version-check --constraint constraints.txt '.[train]'

FROM ${BASE}
LABEL org.opencontainers.image.title="brn-train" \
      org.opencontainers.image.description="Trains with Batch Renormalization and streams what normalization does" \
      org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/brn brn \
    && mkdir -p /var/lib/brn && chown brn:brn /var/lib/brn
COPY --from=build /opt/brn /opt/brn
ENV PATH=/opt/brn/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BRN_SPOOL=/var/lib/brn/spool
USER brn
WORKDIR /var/lib/brn
VOLUME /var/lib/brn
ENTRYPOINT ["brn-train"]
