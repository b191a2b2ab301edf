# The service and its dashboard: no torch, no compiler.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
# The sources are mounted, not copied, and the cache keeps downloads between builds.
RUN --mount=type=bind,target=/src --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/brn \
    && python -m pip --disable-pip-version-check --python /opt/brn/bin/python install --no-compile \
       --constraint /src/constraints.txt '/src[serve]'
# The database engine is one file of 555 MB; everything else is kept small. Nothing that runs opens the libraries' own
# tests, their headers, the parts of Arrow for other protocols and the parts of plotly for notebooks. Of the rest, what
# a start imports is compiled, as nothing can be when the root is read-only.
RUN cd /opt/brn/lib/python3.*/site-packages \
    && find . -depth -type d -name tests -exec rm -rf {} + \
    && rm -rf pyarrow/include pyarrow/includes pyarrow/src pyarrow/*.pyx pyarrow/*.pxd pyarrow/*.pxi \
       pyarrow/*flight* pyarrow/*s3* pyarrow/libarrow_python*.so pyarrow/*.so.*.*.* \
       plotly/labextension plotly/package_data/widgetbundle.js /opt/brn/share/jupyter \
    && /opt/brn/bin/python -c "import chdb, dashboard.__main__, pyarrow.csv, pyarrow.parquet; dashboard.report"

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
