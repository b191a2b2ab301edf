# The training worker. torch comes as the registry's default build, which brings its own CUDA libraries.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
# Copied, not mounted: not every builder notices that what it mounts has changed. The cache keeps downloads.
COPY . /src
# With vision: image files, and networks by name.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/brn \
    && /opt/brn/bin/pip install --disable-pip-version-check --constraint /src/constraints.txt '/src[train,vision]'

FROM ${BASE}
LABEL org.opencontainers.image.title="brn-train" \
      org.opencontainers.image.description="Trains with Batch Renormalization and streams what normalization does" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
# tini is process 1: a signal ends what it starts at any time, also while torch is being imported.
# --compile and Batch Renorm's kernels need g++ with its gcc, and Python.h, which python:* images have and others may not.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini g++ \
        $(test -e "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || echo libpython3-dev) \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --uid 10001 --no-create-home --home-dir /var/lib/brn brn \
    && mkdir -p /var/lib/brn/spool /checkpoints /data && chown -R brn:brn /var/lib/brn /checkpoints
COPY --from=build /opt/brn /opt/brn
# What is compiled is executed from where it is kept: the volume, as Docker mounts a tmpfs like /tmp noexec.
ENV PATH=/opt/brn/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BRN_SPOOL=/var/lib/brn/spool \
    BRN_DATA=/data \
    XDG_CACHE_HOME=/var/lib/brn/cache \
    TRITON_CACHE_DIR=/var/lib/brn/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/lib/brn/cache/inductor
USER brn
WORKDIR /var/lib/brn
VOLUME /var/lib/brn
ENTRYPOINT ["tini", "--", "brn-train"]
