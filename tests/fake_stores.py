"""Object stores on this machine: small servers that speak the interfaces of GCS and of S3.

They hold objects in memory, and answer gcsfs, s3fs and TensorStore as far as these ask.  `Store`
counts the bytes that are read.
"""

import contextlib
import json
import re
import threading
import urllib.parse
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape


class Store(ThreadingHTTPServer):
    """A server with one bucket.

    Attributes:
      objects: content of the objects by key.
      bytes_read: bytes of objects that were read.
      refused: keys that cannot be written, as a pattern; None: all can.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.bytes_read = 0
        self.refused: str | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, key: str, content: bytes) -> bool:
        if self.refused is not None and re.search(self.refused, key):
            return False
        with self.lock:
            self.objects[key] = content
        return True

    def keys(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(key for key in self.objects if key.startswith(prefix))

    def listing(self, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
        """Keys directly under a prefix, and common prefixes of the others."""
        found, prefixes = [], set()
        for key in self.keys(prefix):
            head, slash, _ = key[len(prefix) :].partition(delimiter or "\0")
            if slash:
                prefixes.add(prefix + head + slash)
            else:
                found.append(key)
        return found, sorted(prefixes)

    def handle_error(self, *_) -> None:
        """A client that closes its connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Store

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: bytes = b"", code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            content = b"".join(parts)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            content = _aws_chunks(content)
        return content

    def answer_object(self, content: bytes, **headers: str) -> None:
        """Answers with an object, or the range of it that was asked for."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.command == "HEAD":
            part, code = content, 200
        else:
            low = int(match[1]) if match[1] else max(len(content) - int(match[2]), 0)
            high = int(match[2]) + 1 if match[1] and match[2] else len(content)
            part, code = content[low:high], 206
            if low >= len(content) > 0:
                return self.answer(b"", 416, Content_Range=f"bytes */{len(content)}")
            last = low + len(part) - 1
            headers["Content_Range"] = f"bytes {low}-{last}/{len(content)}"
        if self.command != "HEAD":
            self.server.bytes_read += len(part)
        self.answer(part, code, **headers)


def _aws_chunks(content: bytes) -> bytes:
    parts = []
    while content:
        head, _, content = content.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        parts.append(content[:size])
        content = content[size + 2 :]
    return b"".join(parts)


class _Gcs(_Handler):
    """The JSON API of Google Cloud Storage."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        match = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        if match is None:
            return self.error(404)
        key = None if match[2] is None else urllib.parse.unquote(match[2])
        if key is None and url.path.endswith("/o"):
            return self.list(query)
        if key is None:
            return self.reply({"name": match[1], "kind": "storage#bucket"})
        content = self.server.objects.get(key)
        if content is None:
            return self.error(404)
        if query.get("alt") == "media":
            generation = str(_generation(content))
            if query.get("ifGenerationNotMatch") == generation:
                return self.answer(b"", 304)  # has no body
            return self.answer_object(content, x_goog_generation=generation)
        return self.reply(self.describe(key, content))

    def do_POST(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query, body = dict(urllib.parse.parse_qsl(url.query)), self.body()
        if url.path.startswith("/batch/"):
            return self.batch(body)
        if url.path.startswith("/upload/"):
            return self.upload(query, body)
        if url.path.startswith("/resume/"):
            return self.resume(body)
        match = re.fullmatch(
            r"/storage/v1/b/[^/]+/o/(.*)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.*)", url.path
        )
        if match is None:
            return self.error(404)
        source, target = map(urllib.parse.unquote, match.groups())
        content = self.server.objects.get(source)
        if content is None or not self.server.put(target, content):
            return self.error(404)
        resource = self.describe(target, content)
        self.reply({"done": True, "resource": resource} | resource)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            identity = str(len(self.server.uploads))
            self.server.uploads[identity] = {-1: name.encode()}
            return self.answer(b"{}", Location=f"{self.server.url}/resume/{identity}")
        name, content = query.get("name"), body
        if kind == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip("'\"").encode()
            meta, content = (part for part in _parts(body, boundary))
            name = json.loads(meta)["name"]
        self.store(name, content, query)

    def store(self, name: str | None, content: bytes, query: dict[str, str]) -> None:
        old = self.server.objects.get(name or "")
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != str(0 if old is None else _generation(old)):
            return self.error(412)
        if not name or not self.server.put(name, content):
            return self.error(403)
        self.reply(self.describe(name, content))

    def do_PUT(self) -> None:
        self.resume(self.body())

    def resume(self, body: bytes) -> None:
        upload = self.server.uploads[self.path.rpartition("/")[2]]
        match = re.fullmatch(r"bytes (\d+|\*)(?:-(\d+))?/(\d+|\*)", self.headers["Content-Range"])
        if match[1] != "*":
            upload[int(match[1])] = body
        got = b"".join(upload[at] for at in sorted(upload) if at >= 0)
        if match[3] == "*":
            return self.answer(b"", 308, Range=f"bytes=0-{len(got) - 1}")
        self.store(upload[-1].decode(), got, {})

    def do_DELETE(self) -> None:
        key = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.split("/o/", 1)[1])
        with self.server.lock:
            found = self.server.objects.pop(key, None)
        self.answer(b"", 204) if found is not None else self.error(404)

    def batch(self, body: bytes) -> None:
        """Deletes several objects, each a request in a part of the body."""
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body), 1):
            key = urllib.parse.unquote(path.decode().split("/o/", 1)[1].split("?")[0])
            with self.server.lock:
                self.server.objects.pop(key, None)
            parts.append(
                f"--b\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                "HTTP/1.1 204 No Content\r\n\r\n\r\n"
            )
        content = ("".join(parts) + "--b--").encode()
        self.answer(content, Content_Type="multipart/mixed; boundary=b")

    def list(self, query: dict[str, str]) -> None:
        keys, prefixes = self.server.listing(query.get("prefix", ""), query.get("delimiter", ""))
        keys = [key for key in keys if key >= query.get("startOffset", "")]
        if "endOffset" in query:
            keys = [key for key in keys if key < query["endOffset"]]
        items = [self.describe(key, self.server.objects[key]) for key in keys]
        self.reply({"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def describe(self, key: str, content: bytes) -> dict:
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": "bucket-1",
            "size": str(len(content)),
            "generation": str(_generation(content)),
            "metageneration": "1",
            "etag": str(_generation(content)),
            "updated": "2025-01-01T00:00:00.000Z",
            "timeCreated": "2025-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }

    def reply(self, content: dict) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def error(self, code: int) -> None:
        content = {"error": {"code": code, "message": f"fake error {code}"}}
        self.answer(json.dumps(content).encode(), code, Content_Type="application/json")


def _parts(body: bytes, boundary: bytes) -> list[bytes]:
    """Contents of the two parts of a multipart body."""
    parts, rest = [], body
    for _ in range(2):
        _, _, rest = rest.partition(b"--" + boundary)
        head, found, rest = rest.partition(b"\r\n\r\n" if rest.startswith(b"\r") else b"\n\n")
        assert found, head[:80]
        end = rest.index(b"\n--" + boundary) if not parts else rest.rindex(b"\n--" + boundary)
        parts.append(rest[:end].removesuffix(b"\r"))
        rest = rest[end + 1 :]
    return parts


def _generation(content: bytes) -> int:
    return zlib.crc32(content) + 1


class _S3(_Handler):
    """The REST API of S3, with the bucket in the path."""

    def target(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        return urllib.parse.unquote(url.path).lstrip("/").partition("/")[2], query

    def do_GET(self) -> None:
        key, query = self.target()
        if not key:
            return self.list(query)
        content = self.server.objects.get(key)
        if content is None:
            return self.error(404, "NoSuchKey")
        self.answer_object(content, **self.headers_of(content))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        key, query = self.target()
        body = self.body()
        if "uploadId" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return self.answer(**self.headers_of(body))
        if "x-amz-copy-source" in self.headers:
            source = urllib.parse.unquote(self.headers["x-amz-copy-source"]).lstrip("/")
            body = self.server.objects[source.partition("/")[2]]
        if not self.server.put(key, body):
            return self.error(403, "AccessDenied")
        self.answer(**self.headers_of(body))

    def do_POST(self) -> None:
        key, query = self.target()
        body = self.body()
        if "delete" in query:
            for name in re.findall(rb"<Key>(.*?)</Key>", body):
                with self.server.lock:
                    self.server.objects.pop(name.decode(), None)
            return self.xml("<DeleteResult/>")
        if "uploads" in query:
            identity = str(len(self.server.uploads))
            self.server.uploads[identity] = {}
            return self.xml(
                "<InitiateMultipartUploadResult><UploadId>"
                f"{identity}</UploadId></InitiateMultipartUploadResult>"
            )
        parts = self.server.uploads[query["uploadId"]]
        if not self.server.put(key, b"".join(parts[number] for number in sorted(parts))):
            return self.error(403, "AccessDenied")
        self.xml("<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")

    def do_DELETE(self) -> None:
        key, _ = self.target()
        with self.server.lock:
            self.server.objects.pop(key, None)
        self.answer(b"", 204)

    def list(self, query: dict[str, str]) -> None:
        prefix = query.get("prefix", "")
        keys, prefixes = self.server.listing(prefix, query.get("delimiter", ""))
        keys = [key for key in keys if key > query.get("start-after", "")]
        encode = urllib.parse.quote if query.get("encoding-type") == "url" else escape
        items = "".join(
            f"<Contents><Key>{encode(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            '<ETag>"x"</ETag><LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>'
            for key in keys
        )
        common = "".join(
            f"<CommonPrefixes><Prefix>{encode(one)}</Prefix></CommonPrefixes>" for one in prefixes
        )
        encoding = "<EncodingType>url</EncodingType>" if "encoding-type" in query else ""
        self.xml(
            f"<ListBucketResult>{encoding}<Name>bucket-1</Name><Prefix>{encode(prefix)}</Prefix>"
            f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{items}{common}"
            "</ListBucketResult>"
        )

    def headers_of(self, content: bytes) -> dict[str, str]:
        return {
            "ETag": f'"{zlib.crc32(content):x}"',
            "Last_Modified": "Wed, 01 Jan 2025 00:00:00 GMT",
        }

    def xml(self, text: str) -> None:
        content = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
        self.answer(content, Content_Type="application/xml")

    def error(self, code: int, name: str) -> None:
        content = f"<Error><Code>{name}</Code><Message>fake</Message></Error>".encode()
        self.answer(content, code, Content_Type="application/xml")


@contextlib.contextmanager
def serve(kind: str) -> Iterator[tuple[Store, dict[str, str]]]:
    """Runs a store, "gs" or "s3".

    Yields:
      The store, and the environment variables that lead its clients to it.
    """
    store = Store(_Gcs if kind == "gs" else _S3)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    environment = {
        "STORAGE_EMULATOR_HOST": store.url,
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        yield store, environment
    finally:
        store.shutdown()
        store.server_close()
