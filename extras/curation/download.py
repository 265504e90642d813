"""Download pictures that documents name, from anywhere, with bounds on all that a server can do."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import suppress
from urllib.parse import quote, urljoin, urlsplit

from cli import VERSION

BACKOFF = 0.5  # seconds before the first retry, doubled before the next
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAX_FAILURES = 5  # in a row, of one host, after which its other pictures are not tried


class Dropped(Exception):
    """A picture that is not used; its text is the cause, as counted in the statistics."""


def is_public(address):
    """Whether an IP address belongs to the public internet."""
    address = ipaddress.ip_address(address)
    if address.version == 6:  # an IPv4 address may be inside
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.ip_address(int(address) % 2**32)
        address = inner or address
    return address.is_global and not address.is_multicast


class Downloader:
    """Downloads pictures from several threads, with care for their hosts and for this machine.

    A request takes at most `timeout` seconds and `max_bytes` bytes. It connects to an address that
    was checked, after redirects too, and ignores the environment's proxies.
    """

    def __init__(self, timeout, max_bytes, retries, pause, allow_private):
        self.timeout, self.max_bytes, self.retries = timeout, max_bytes, retries
        self.pause, self.allow_private = pause, allow_private
        self.tls = ssl.create_default_context()
        self.lock = threading.Lock()
        self.free_at = {}  # when the next request may be sent to a host
        self.failures = Counter()  # of a host, in a row

    def get(self, url):
        """The bytes behind a URL; raises Dropped."""
        for attempt in range(self.retries + 1):
            try:
                return self.follow(url)
            except Dropped as error:
                if str(error) not in ("timeout", "network error", "server error"):
                    raise
                if attempt == self.retries:
                    raise
            time.sleep(BACKOFF * 2**attempt)

    def follow(self, url):
        """The bytes behind a URL and its redirects."""
        location = url

        for _ in range(MAX_REDIRECTS + 1):
            try:
                url = urljoin(url, location)
                parts = urlsplit(url)
                host, port = parts.hostname, parts.port
            except ValueError:
                raise Dropped("bad address") from None
            if parts.scheme not in ("http", "https") or not host:
                raise Dropped("bad address")
            self.wait(host)
            try:
                data, location = self.request(parts, host, port)
            except (http.client.InvalidURL, UnicodeError):
                raise Dropped("bad address") from None
            except (OSError, http.client.HTTPException) as error:
                self.failures[host] += 1
                timed_out = isinstance(error, TimeoutError)
                raise Dropped("timeout" if timed_out else "network error") from None
            except ValueError:  # of an address that no library accepts
                raise Dropped("bad address") from None
            self.failures[host] = 0
            if location is None:
                return data
        raise Dropped("too many redirects")

    def wait(self, host):
        """Wait for this thread's turn to ask a host."""
        if self.failures[host] >= MAX_FAILURES:
            raise Dropped("host that does not answer")
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.free_at.get(host, now))
            self.free_at[host] = turn + self.pause
        time.sleep(turn - now)

    def address_of(self, host, port):
        """The IP address to connect to; raises Dropped if none is allowed."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        allowed = [a for a in addresses if self.allow_private or is_public(a)]
        if not allowed:
            raise Dropped("private address")
        return allowed[0]

    def request(self, parts, host, port):
        """(bytes, None) behind a split URL, or (None, the URL to go to)."""
        is_tls = parts.scheme == "https"
        port = port or (443 if is_tls else 80)
        sock = socket.create_connection((self.address_of(host, port), port), self.timeout)
        if is_tls:
            sock = self.tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        expired = threading.Event()

        def expire():
            expired.set()
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes the thread that reads

        # The socket's own timeout is for each read: a server could send a byte now and then.
        timer = threading.Timer(self.timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            if is_tls:
                sock.do_handshake()
            kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
            connection = kind(host, port)
            connection.sock = sock
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
            if parts.query:
                target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
            headers = {"User-Agent": f"metaquery/{VERSION}", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=headers)
            answer = self.read(connection.getresponse())
        except (OSError, http.client.HTTPException):
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            sock.close()
        if expired.is_set():
            raise TimeoutError
        return answer

    def read(self, response):
        """(bytes, None) of a response, or (None, the URL it redirects to)."""
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return None, location
        if response.status == 429 or response.status >= 500:
            raise Dropped("server error")
        if response.status != 200:
            raise Dropped("not found")
        robots = response.getheader("X-Robots-Tag", "").lower()
        if "noai" in robots or "noimageai" in robots:
            raise Dropped("owner allows no training")

        data = bytearray()
        while len(data) + (response.length or 0) <= self.max_bytes:
            chunk = response.read1(65_536)
            if not chunk:
                break
            data += chunk
        else:
            raise Dropped("too large")
        if response.length:
            raise http.client.IncompleteRead(b"")
        return bytes(data), None
