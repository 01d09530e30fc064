"""
`crop_image` and `select_images` against bare Pillow, and against sending the pictures as JPEG in base64 over HTTP, as
the released code does between its tool server and its model.

    python tests/benchmarks/tools.py [--side 1008] [--calls 50] [--repeats 5]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import threading
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image
from timing import alternate, tell

from vretrver_hf.images import ImageRef
from vretrver_hf.protocol import get_preset
from vretrver_hf.tools import VisualTools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1008, help="pixels of the pictures")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    blocks = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((args.side, args.side)) for pixels in blocks]
    tools = VisualTools(None, pictures, preset=get_preset("foveated"), factor=28)
    calls = {
        "crop_image": partial(tools.crop_image, [0.25, 0.25, 0.5, 0.5], 2),
        "select_images": partial(tools.select_images, [1, 3]),
    }
    for name, call in calls.items():
        refs = call().refs
        bare = partial(render, refs, pictures)
        with echo_server() as url:
            actions = {
                "bare Pillow": bare,
                name: call,
                "JPEG, base64 and HTTP": partial(over_http, bare, url),
            }
            print(f"\n{name} of {args.side} x {args.side} pixels, {args.calls} calls")
            tell(
                alternate(
                    {label: partial(many, action, args.calls) for label, action in actions.items()}, args.repeats
                )
            )


def render(refs: list[ImageRef], pictures: list[Image.Image]) -> list[Image.Image]:
    return [ref.render(pictures[ref.index - 1]) for ref in refs]


def over_http(bare, url: str) -> list[Image.Image]:
    """The pictures, after a journey through a tool server's reply."""
    encoded = []
    for picture in bare():
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    request = urllib.request.Request(url, json.dumps(encoded).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return [Image.open(io.BytesIO(base64.b64decode(value))).convert("RGB") for value in json.load(reply)]


def many(action, count: int) -> None:
    for _ in range(count):
        action()


class echo_server:  # noqa: N801 - reads as a function where it is used
    """Sends back what it gets."""

    def __enter__(self) -> str:
        class Echo(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    main()
