"""An HTTP server that takes webhooks, or does not."""

from __future__ import annotations

import http.server
import threading


class WebhookReceiver:
    """Keeps what is posted and answers as it is told.

    Args:
        before: one that is closed; this one comes back at its port, with what came to it.

    Attributes:
        answers: (status, headers) of the next answers; then 200. body: of each answer.
        came: (headers in lower case, body, status of the answer) of each request. clients: ports of
            the connections. go: no answer before it is set. port, url: where it listens.
    """

    def __init__(self, before: WebhookReceiver | None = None) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.body = b""
        self.came: list[tuple[dict[str, str], bytes, int]] = before.came if before else []
        self._closed = False
        self.clients: set[int] = set()
        self.go = threading.Event()
        self.go.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if receiver._closed:  # a connection from before
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.go.wait(30)
                receiver.clients.add(self.client_address[1])
                status, headers = receiver.answers.pop(0) if receiver.answers else (200, {})
                asked = {name.lower(): value for name, value in self.headers.items()}
                receiver.came.append((asked, body, status))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(receiver.body)))
                self.end_headers()
                self.wfile.write(receiver.body)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a sender that was killed

        self._server = Quiet(("127.0.0.1", before.port if before else 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/verdicts?line=3"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
