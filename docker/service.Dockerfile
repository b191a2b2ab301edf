# The service and its dashboard: no torch, no compiler.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends binutils
# Copied, not mounted: not every builder notices that what it mounts has changed. The cache keeps downloads.
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/brn \
    && python -m pip --disable-pip-version-check --python /opt/brn/bin/python install --no-compile \
       --constraint /src/constraints.txt '/src[serve]'
# The database engine is one file of 555 MB; everything else is kept small. Nothing that runs opens the libraries' own
# tests, headers and stubs, the parts of Arrow for other protocols, the parts of plotly for notebooks, and pandas, for
# which chDB asks because of data frames that nobody here makes. Symbols of the libraries that come with theirs go too,
# but of numpy's, whose files bear no second change of their layout (they had one for their wheel).
# Last, a store is opened: if anything were missing the build would end here, and what a start imports is compiled, as
# nothing can be when the root is read-only. tests/test_containers.py asks such a service for all that it answers.
RUN cd /opt/brn/lib/python3.*/site-packages \
    && python -m pip --disable-pip-version-check --python /opt/brn/bin/python uninstall --yes pandas \
    && find . -depth -type d -name tests -exec rm -rf {} + \
    && find . -type f -name '*.py[ix]' -delete \
    && rm -rf pyarrow/include pyarrow/includes pyarrow/src pyarrow/*.pxd pyarrow/*.pxi \
       pyarrow/*flight* pyarrow/*s3* pyarrow/libarrow_python*.so pyarrow/*.so.*.*.* \
       plotly/labextension plotly/package_data/widgetbundle.js /opt/brn/share/jupyter \
    && find pyarrow clickhouse_connect lz4 -type f -name '*.so*' -exec strip --strip-unneeded {} + \
    && /opt/brn/bin/python -c "import dashboard.__main__, dashboard.app, service.store as s; \
       s.Store(s.Settings(store='chdb:///tmp/store')).close()"

FROM ${BASE}
LABEL org.opencontainers.image.title="brn-serve" \
      org.opencontainers.image.description="Diagnostics for batch normalization: service and dashboard" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
# tini is process 1: a signal ends what it starts at any time, also before that has handlers of its own.
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --uid 10001 --no-create-home --home-dir /var/lib/brn brn \
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
ENTRYPOINT ["tini", "--"]
CMD ["brn-serve"]
