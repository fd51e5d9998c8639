"""The process that renders chat templates for `castlm.data.templates`: a request on stdin, a reply on stdout, in turn.

It runs as a file, imports nothing of castlm and no torch, and ends with its stdin. Both messages are 8 bytes of length,
little-endian, and JSON.
"""

import contextlib
import json
import resource
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes stdin
    from transformers.utils.chat_template_utils import render_jinja_template

    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while head := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(head, "little")))
        limit_memory(request.pop("num_bytes"))
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))  # of processor time; SIGPROF ends this process
        try:
            (text,), spans = render_jinja_template(**request)
            reply = json.dumps({"text": text, "spans": spans[0] if spans else []})
        except MemoryError:
            reply = json.dumps({"is_memory": True})
        except BaseException as error:  # a template is a program and may raise anything
            reply = json.dumps({"error": str(error) or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = reply.encode()
        replies.write(len(content).to_bytes(8, "little") + content)
        replies.flush()


def limit_memory(num_bytes: int) -> None:
    """Makes an allocation of more than `num_bytes` above the present size fail with a MemoryError, on Linux."""
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
