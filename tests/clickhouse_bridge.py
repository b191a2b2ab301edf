"""ClickHouse's HTTP interface answered from chDB, so that tests run a store on a server with the real HTTP client.

Run as `python clickhouse_bridge.py FOLDER PORT`, in a process of its own, as chDB holds one engine a process. It knows
what clickhouse-connect sends: the statement in the body or as `query` beside inserted data, `database`, settings and
`param_*` in the URL, bodies in lz4, zstd or gzip, answers in lz4 or gzip, errors with their code in a header. It does
not know sessions, quotas, roles, external data, progress, nor errors in the middle of an answer.

A database that is made ON CLUSTER is that of a cluster of one: its tables say that they are replicated, and are not.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Final

import chdb
import lz4.frame
import pyarrow as pa
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

USER: Final = "brn"
PASSWORD: Final = "bridge-password"

_OF_THE_TRANSPORT: Final = {
    "query",
    "database",
    "default_format",
    "session_id",
    "session_timeout",
    "session_check",
    "query_id",
    "quota_key",
    "role",
    "compress",
    "decompress",
    "buffer_size",
    "wait_end_of_query",
    "client_protocol_version",
    "enable_http_compression",
    "send_progress_in_http_headers",
    "http_headers_progress_interval_ms",
    "cancel_http_readonly_queries_on_client_close",
}
"""Names in the URL that are no settings of a statement; any other is one, or a parameter (`param_...`)."""

CLUSTER: Final = "brn"
"""The only cluster it belongs to."""
_ON_CLUSTER: Final = re.compile(r" ON CLUSTER `(\w+)`")

_INSERT: Final = re.compile(rb"(\s*INSERT\s+INTO\s[^;']*?)\sFORMAT\s+(\w+)\s*(?:\n|$)", re.IGNORECASE)
_FORMAT: Final = re.compile(r"\sFORMAT\s+(\w+)\s*$", re.IGNORECASE)
_CODE: Final = re.compile(r"Code: (\d+)")
_STATUS: Final = {"60": 404, "62": 400, "81": 404, "516": 403}
"""HTTP status by error code; 500 for any other."""


def _opened(body: bytes, encoding: str) -> bytes:
    if encoding == "lz4":
        opened: bytes = lz4.frame.decompress(body)
        return opened
    if encoding == "gzip":
        return gzip.decompress(body)
    if encoding == "zstd":
        return pa.CompressedInputStream(pa.BufferReader(body), "zstd").read()
    return body


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _alone(sql: str) -> str:
    """A statement for a cluster as one for the engine here, which has no Keeper."""
    if (on := _ON_CLUSTER.search(sql)) is not None:
        if on[1] != CLUSTER:
            raise RuntimeError(
                f"Code: 701. DB::Exception: Requested cluster '{on[1]}' not found. (CLUSTER_DOESNT_EXIST)"
            )
        sql = sql.replace(on[0], "").replace("ENGINE = Replicated", "ENGINE = ")
        sql = sql.replace(" replicated_deduplication_window", " non_replicated_deduplication_window")
        if sql.startswith("CREATE TABLE") and "COMMENT" not in sql:
            sql += " COMMENT 'on cluster'"
    return sql.replace(
        "SELECT name, engine FROM system.tables",
        "SELECT name, concat(if(comment = 'on cluster', 'Replicated', ''), engine) AS engine FROM system.tables",
    )


def _execute(path: str, url: Mapping[str, str], body: bytes) -> tuple[Any, str]:
    """The result of a statement, and the name of its format. A connection of its own: what it sets ends with it."""
    insert = _INSERT.match(url["query"].encode() if "query" in url else body)
    with closing(chdb.connect(path)) as connection, tempfile.NamedTemporaryFile() as file:
        if "database" in url:
            connection.query(f"USE `{url['database']}`")
        for name, value in url.items():
            if name not in _OF_THE_TRANSPORT and not name.startswith("param_"):
                connection.query(f"SET {name} = {_quoted(value)}")
        parameters = {name.removeprefix("param_"): value for name, value in url.items() if name.startswith("param_")}
        if insert is not None:
            file.write(body if "query" in url else body[insert.end() :])
            file.flush()
            into, form = (part.decode() for part in insert.groups())
            return connection.query(f"{into} FROM INFILE {_quoted(file.name)} FORMAT {form}"), form
        sql = _alone((url.get("query", "") + body.decode()).strip())
        named = _FORMAT.search(sql)
        form = named[1] if named else url.get("default_format", "TabSeparated")
        return connection.query(sql, form, params=parameters), form


def create_app(path: str) -> Starlette:
    """Answers statements from the engine in a folder, all of one user."""
    known = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def failure(message: str) -> Response:
        found = _CODE.search(message)
        code = found[1] if found else "1002"
        headers = {"X-ClickHouse-Exception-Code": code}
        return PlainTextResponse(message, status_code=_STATUS.get(code, 500), headers=headers)

    async def answer(request: Request) -> Response:
        if request.headers.get("authorization") != known:
            return failure(f"Code: 516. DB::Exception: {USER}: Authentication failed. (AUTHENTICATION_FAILED)")
        url = request.query_params
        body = _opened(await request.body(), request.headers.get("content-encoding", ""))
        try:
            result, form = await run_in_threadpool(_execute, path, url, body)
        except Exception as error:  # chDB's own, which is no public name; whatever it is, a server answers
            return failure(str(error))
        content = result.bytes()
        counts = {"read_rows": result.rows_read(), "written_rows": result.rows_written()}
        headers = {
            "X-ClickHouse-Summary": json.dumps({name: str(count) for name, count in counts.items()}),
            "X-ClickHouse-Format": form,
            "X-ClickHouse-Timezone": "UTC",
        }
        accepted = request.headers.get("accept-encoding", "")
        if content and url.get("enable_http_compression") == "1" and accepted in ("lz4", "gzip"):
            content = lz4.frame.compress(content) if accepted == "lz4" else gzip.compress(content)
            headers["Content-Encoding"] = accepted
        return Response(content, headers=headers)

    async def ping(request: Request) -> Response:
        return PlainTextResponse("Ok.\n")

    return Starlette(routes=[Route("/", answer, methods=["GET", "POST"]), Route("/ping", ping)])


def main(path: str, port: int) -> None:
    """Serves until it is ended, on a port that another process may hold for it without listening."""
    engine = chdb.connect(path)  # the engine lives as long as one connection does
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    print("listening", flush=True)
    uvicorn.Server(uvicorn.Config(create_app(path), log_level="warning")).run(sockets=[listener])
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
