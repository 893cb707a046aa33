"""A double of Windows: make this process, and those it starts, refuse what Windows refuses (found by PYTHONPATH).

What a file system does there holds for everybody: an open, mapped or locked file, the current folder, names, the text
encoding, line ends, descriptors that cannot be synced, permission bits, signals from outside. What a program finds out
about its system (`os.name`, `sys.platform`, missing functions and modules) is Windows' for this project's own modules
and for the few below; other libraries keep their POSIX code, which is the only one that they can run here. Path
separators, letter case and drive letters stay those of this system. WINDOWS names a folder in which the processes under
the double sign up, so that each sees what the others hold open. `tests/windows/test_windows.py` holds the double against
what is documented of Windows.
"""

import asyncio
import builtins
import concurrent.futures.process  # noqa: F401 (imported before the modules change under it)
import contextlib
import errno
import fcntl
import importlib.util
import io
import multiprocessing
import multiprocessing.context
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import types

import filelock
import psutil

OURS = ("scripts", "serve", "eval", "__main__", "uvicorn.server", "concurrent.futures.process")
ENCODING = "cp1252"
SIGBREAK, CTRL_C_EVENT, CTRL_BREAK_EVENT = 21, 0, 1
CREATE_NEW_PROCESS_GROUP = 0x200
MAPPED = (".safetensors", ".gguf", ".arrow", ".parquet", ".bin", ".pt", ".so")
NO_SUCH_MODULE = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "_posixsubprocess")
NO_SUCH_OS = (
    "fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "setsid", "killpg", "getpgid", "setpgid", "getpgrp", "wait",
    "sched_getaffinity", "sched_setaffinity", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_SYNC", "mkfifo",
    "uname", "sysconf", "statvfs", "getloadavg", "nice", "chown", "fchmod", "fchown", "WNOHANG", "sync", "pread", "pwrite",
    "posix_fadvise", "fdatasync", "sendfile", "confstr", "ctermid", "getgroups", "tcgetpgrp",
)  # fmt: skip
NO_SUCH_SIGNAL = (
    "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGQUIT", "SIGTSTP", "SIGCONT", "SIGSTOP",
    "SIGTTIN", "SIGWINCH", "alarm", "setitimer", "pause", "pthread_kill", "pthread_sigmask", "siginterrupt", "sigwait",
)  # fmt: skip
SIGNALS = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGINT, signal.SIGSEGV, signal.SIGTERM, SIGBREAK}
MESSAGES = {
    5: (errno.EACCES, "Access is denied"),
    32: (errno.EACCES, "The process cannot access the file because it is being used by another process"),
    33: (errno.EACCES, "The process cannot access the file because another process has locked a portion of the file"),
    123: (errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect"),
    183: (errno.EEXIST, "Cannot create a file when that file already exists"),
    1224: (errno.EINVAL, "The requested operation cannot be performed on a file with a user-mapped section open"),
    1314: (errno.EINVAL, "A required privilege is not held by the client"),
}

caller = sys._getframe
real = types.SimpleNamespace(**{name: value for name, value in vars(os).items() if callable(value)})
real.io_open, real.signal, real.getsignal, real.raise_signal = (
    io.open,
    signal.signal,
    signal.getsignal,
    signal.raise_signal,
)
registry = os.environ["WINDOWS"]
real.close(real.open(os.path.join(registry, str(os.getpid())), os.O_CREAT | os.O_WRONLY))


def is_ours(module):
    return module.partition(".")[0] in OURS or module in OURS


def refuse(number, path):
    code, text = MESSAGES[number]
    error = OSError(code, text, os.fspath(path))
    error.winerror = number
    raise error


# --- what is open


def peers():
    """List the processes under the double."""
    return [pid for pid in real.listdir(registry) if os.path.isdir(f"/proc/{pid}/fd")]


def open_files(*, mapped):
    """Return (device, inode) of every regular file that a process under the double has open, or mapped."""
    found = set()
    for pid in peers():
        with contextlib.suppress(OSError):
            for descriptor in real.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    status = real.stat(f"/proc/{pid}/fd/{descriptor}")
                    if stat.S_ISREG(status.st_mode):
                        found.add((status.st_dev, status.st_ino))
        if mapped:
            found |= mapped_files(pid)
    return found


def mapped_files(pid="self"):
    found = set()
    with contextlib.suppress(OSError), real.io_open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                major, minor = (int(part, 16) for part in fields[3].split(":"))
                found.add((os.makedev(major, minor), int(fields[4])))
    return found


def locked_files():
    """Return (device, inode) of every file with a lock of filelock's on it, which is byte 0 of it there."""
    found = set()
    with real.io_open("/proc/locks", encoding="utf-8") as lines:
        for line in lines:
            if match := re.search(
                r": FLOCK .* (\w+):(\w+):(\d+) ", line
            ):  # a process that waits has an arrow before it
                found.add((os.makedev(int(match[1], 16), int(match[2], 16)), int(match[3])))
    return found


def held(path, status=None):
    """Say whether a file, or a file below a folder, is open somewhere."""
    status = status or real.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return (status.st_dev, status.st_ino) in open_files(mapped=os.fspath(path).endswith(MAPPED))
    everything = open_files(mapped=True)
    for folder, _, files in real.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                inner = real.lstat(os.path.join(folder, name))
                if (inner.st_dev, inner.st_ino) in everything:
                    return True
    return False


def is_current_folder(path):
    resolved = os.path.realpath(path)
    for pid in peers():
        with contextlib.suppress(OSError):
            current = real.readlink(f"/proc/{pid}/cwd")
            if current == resolved or current.startswith(resolved + "/"):
                return True
    return False


RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def check_name(path):
    name = os.path.basename(os.fspath(path))
    name = name.decode() if isinstance(name, bytes) else name
    if (
        re.search(r'[<>:"|?*\\\x00-\x1f]', name)
        or (name not in (".", "..") and name != name.rstrip(". "))
        or RESERVED.fullmatch(name)
    ):
        refuse(123, path)


# --- the file system


def unlink(path, *, dir_fd=None):
    if dir_fd is None:
        status = real.lstat(path)
        if stat.S_ISREG(status.st_mode):
            if held(path, status):
                refuse(32, path)
            if not status.st_mode & stat.S_IWUSR:
                refuse(5, path)
    real.unlink(path, dir_fd=dir_fd)


def check_movable(source, target):
    check_name(target)
    status = real.lstat(source)
    if stat.S_ISDIR(status.st_mode):
        if is_current_folder(source):
            refuse(32, source)
        if held(source, status):
            refuse(5, source)
    elif held(source, status):
        refuse(32, source)


def rename(source, target, **options):
    check_movable(source, target)
    if os.path.lexists(target) and not os.path.samefile(source, target):
        refuse(183, target)
    real.rename(source, target, **options)


def replace(source, target, **options):
    check_movable(source, target)
    if os.path.lexists(target):
        status = real.lstat(target)
        if stat.S_ISDIR(status.st_mode) or held(target, status) or not status.st_mode & stat.S_IWUSR:
            refuse(5, target)
    real.replace(source, target, **options)


def rmdir(path, *, dir_fd=None):
    if is_current_folder(path):
        refuse(32, path)
    real.rmdir(path, dir_fd=dir_fd)


def mkdir(path, mode=0o777, *, dir_fd=None):
    check_name(path)
    real.mkdir(path, mode, dir_fd=dir_fd)


def symlink(source, target, target_is_directory=False, *, dir_fd=None):
    refuse(1314, target)


def fsync(descriptor):
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real.fsync(number)


def check_opening(path, *, writes, truncates):
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = real.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        if stat.S_ISREG(status.st_mode):
            key = (status.st_dev, status.st_ino)
            if key in locked_files():  # there the file opens and the first read fails
                refuse(33, path)
            if truncates and os.fspath(path).endswith(MAPPED) and any(key in mapped_files(pid) for pid in peers()):
                refuse(1224, path)
            if writes and not status.st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return
    if writes:
        check_name(path)


def os_open(path, flags, mode=0o777, *, dir_fd=None):
    from_filelock = caller(1).f_globals.get("__name__", "").startswith("filelock")
    if dir_fd is None and not from_filelock:
        check_opening(path, writes=flags & os.O_ACCMODE != os.O_RDONLY, truncates=bool(flags & os.O_TRUNC))
    return real.open(path, flags, mode, dir_fd=dir_fd)


def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    writes = any(letter in mode for letter in "wax+")
    if isinstance(file, (str, bytes, os.PathLike)) and opener is None:
        check_opening(file, writes=writes, truncates="w" in mode)
    if "b" not in mode:
        encoding = ENCODING if encoding in (None, "locale") else encoding
        newline = "\r\n" if newline is None and writes and "+" not in mode else newline
    return real.io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)


def shown(status):
    """Show a file's status as Windows does: of the permission bits only whether it can be written."""
    kind, (values, more) = status.__reduce__()
    mode = values[0]
    bits = 0o777 if stat.S_ISDIR(mode) else 0o666 if mode & stat.S_IWUSR else 0o444
    return kind((stat.S_IFMT(mode) | bits, *values[1:4], 0, 0, *values[6:]), more)


def os_stat(path, *, dir_fd=None, follow_symlinks=True):
    return shown(real.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))


def os_lstat(path, *, dir_fd=None):
    return shown(real.lstat(path, dir_fd=dir_fd))


def os_fstat(descriptor):
    return shown(real.fstat(descriptor))


def chmod(path, mode, *, dir_fd=None, follow_symlinks=True):
    now = stat.S_IMODE(real.stat(path).st_mode)
    real.chmod(path, now | stat.S_IWUSR if mode & stat.S_IWUSR else now & ~0o222)


for function in (unlink, rename, replace, rmdir, mkdir, symlink, fsync, chmod):
    setattr(os, function.__name__, function)
os.remove, os.open, os.stat, os.lstat, os.fstat = unlink, os_open, os_stat, os_lstat, os_fstat
os.supports_dir_fd, os.supports_fd = set(), set()
builtins.open = io.open = open_file
shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False
pathlib.os = os


class WindowsFileLock(filelock.UnixFileLock):
    """Remove the lock's file after its release, as filelock does on Windows."""

    def _release(self):
        super()._release()
        with contextlib.suppress(OSError):
            unlink(self.lock_file)


filelock.FileLock = WindowsFileLock


# --- text


for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
    if stream is not None and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
        stream.reconfigure(encoding=ENCODING, errors=errors)


# --- processes and signals

raised = set()
handlers = {signal.SIGTERM: signal.SIG_DFL}


def on_terminate(number, frame):
    """Run the handler of a signal that this process raised itself; one from outside ends a process there at once."""
    if number in raised and callable(handlers[number]):
        raised.discard(number)
        handlers[number](number, frame)
    else:
        real.kill(real.getpid(), 9)


def set_handler(number, handler):
    if is_ours(caller(1).f_globals.get("__name__", "")) and number not in SIGNALS:
        raise ValueError("invalid signal value")
    if number != signal.SIGTERM:
        return real.signal(number, handler)
    before, handlers[number] = handlers[number], handler
    real.signal(number, on_terminate)
    return before


def get_handler(number):
    return handlers[number] if number == signal.SIGTERM else real.getsignal(number)


def raise_signal(number):
    if number == signal.SIGTERM:
        raised.add(number)
    real.raise_signal(number)


def kill(pid, number):
    if not is_ours(caller(1).f_globals.get("__name__", "")) and number not in (signal.SIGTERM, signal.SIGKILL):
        real.kill(pid, number)
    elif number in (CTRL_C_EVENT, CTRL_BREAK_EVENT):
        real.killpg(pid, signal.SIGINT if number == CTRL_C_EVENT else SIGBREAK)
    else:
        real.kill(pid, 9)


real.signal(SIGBREAK, lambda number, frame: real._exit(0x3A))
signal.signal, signal.getsignal, signal.raise_signal, os.kill = set_handler, get_handler, raise_signal, kill
signal.SIGBREAK, signal.CTRL_C_EVENT, signal.CTRL_BREAK_EVENT = SIGBREAK, CTRL_C_EVENT, CTRL_BREAK_EVENT
subprocess.CREATE_NEW_PROCESS_GROUP = CREATE_NEW_PROCESS_GROUP
subprocess.CREATE_NO_WINDOW = 0x08000000

start_process = subprocess.Popen.__init__


def init(self, *arguments, creationflags=0, start_new_session=False, preexec_fn=None, **options):
    if preexec_fn is not None:
        raise ValueError("preexec_fn is not supported on Windows platforms")
    text = options.get("text") or options.get("universal_newlines") or options.get("errors")
    if text and not options.get("encoding"):
        options["encoding"] = ENCODING
    if creationflags & CREATE_NEW_PROCESS_GROUP:
        options["process_group"] = 0
    start_process(self, *arguments, **options)


def send_signal(self, number):
    if self.poll() is None:
        if number in (CTRL_C_EVENT, CTRL_BREAK_EVENT):
            real.killpg(self.pid, signal.SIGINT if number == CTRL_C_EVENT else SIGBREAK)
        elif number in (signal.SIGTERM, signal.SIGKILL):
            real.kill(self.pid, 9)
        else:
            raise ValueError(f"Unsupported signal: {number}")


subprocess.Popen.__init__, subprocess.Popen.send_signal = init, send_signal
multiprocessing.context._concrete_contexts.pop("fork")
multiprocessing.context._concrete_contexts.pop("forkserver")
multiprocessing.set_start_method("spawn")


def not_there(*arguments, **options):
    raise NotImplementedError


for name in ("add_signal_handler", "remove_signal_handler", "create_unix_server", "create_unix_connection"):
    setattr(asyncio.SelectorEventLoop, name, not_there)


# --- what a program finds out about its system


def seen_as(module, facts, missing):
    """Let this project's modules see other facts of a module than libraries do, and miss some of its names."""
    names = dict(vars(module))

    def fact(name, value):
        return property(lambda self: value if is_ours(caller(1).f_globals.get("__name__", "")) else names[name])

    def gap(name):
        def look(self):
            if is_ours(caller(1).f_globals.get("__name__", "")):
                raise AttributeError(name)
            return names[name]

        return property(look)

    own = {name: fact(name, value) for name, value in facts.items()}
    own |= {name: gap(name) for name in missing if name in names}
    own["__reduce__"] = lambda self: (importlib.import_module, (self.__name__,))  # modules are hashed by dill
    module.__class__ = type("WindowsModule", (types.ModuleType,), own)


seen_as(os, {"name": "nt"}, NO_SUCH_OS)
seen_as(sys, {"platform": "win32"}, ("abiflags",))
seen_as(signal, {}, NO_SUCH_SIGNAL)
find_module = builtins.__import__


def import_module(name, globals=None, *more, **options):
    if name in NO_SUCH_MODULE and is_ours((globals or {}).get("__name__", "")):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    return find_module(name, globals, *more, **options)


builtins.__import__ = import_module
memory_info = psutil.Process.memory_info


def windows_memory_info(self):
    info = memory_info(self)
    return (
        types.SimpleNamespace(**info._asdict(), peak_wset=info.rss)
        if is_ours(caller(1).f_globals["__name__"])
        else info
    )


psutil.Process.memory_info = windows_memory_info
tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # as the standard library has it on Windows

_offline = importlib.util.spec_from_file_location(
    "offline_guard",
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "offline", "sitecustomize.py"),
)
_offline.loader.exec_module(importlib.util.module_from_spec(_offline))
