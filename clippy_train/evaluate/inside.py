"""Run one sample under supervision: the two processes inside the sandbox. `sandbox` starts `main` in an interpreter.

The supervisor confines itself to new namespaces if they are available, forks the sample's process, adds up what all the
sample's processes use, ends them, and reports. The sample's process restricts itself and then runs the program and its
checks. Standard input is a `Job` as JSON. Standard output is a JSON object: `outcome`, a verdict about the sample, or
`fault`, the reason why there is none.

Time is what the sample would have taken on a machine of its own: the waits for a core do not count. Time, memory and
number of processes are sampled every `POLL` seconds. The kernel itself limits the memory of each process; in
namespaces, the number of processes and the size of all files; in a control group, the memory and number of all.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from clippy_train.evaluate import confine

POLL = 0.02
PROCESSES = 32  # including threads
SPARE_PROCESSES = 1024  # of a user whose processes cannot be told apart from the sample's by the kernel
FILE_BYTES = 16 << 20
DISK_BYTES = 64 << 20
LOW_DISK_BYTES = 1 << 20
OPEN_FILES = 64
CORES = 4  # that a sample sees at most: a pool of one process per core must not depend on the machine
REPORT_BYTES = 4096  # of a sample's report that are read
EXIT_SECONDS = 10.0  # for killed processes to exit
LONGEST_LOOK = 1.0  # seconds that count between two looks: if there were more, all of this was paused, or starved
PASSED = "passed"
TIMED_OUT = "timed out"
NO_MEMORY = "the kernel ran out of memory: use fewer workers"


class Job(NamedTuple):  # a dataclass costs 20 ms of imports, in every sample
    """A program with its checks, and how to run it.

    Attributes:
        token: printed if the checks pass.
        interpreter: what `interpreter` must return here.
        folder: for the sample's files, if it has no private file system.
        group: the control group of its processes, if there is one.
    """

    program: str
    test: str
    entry_point: str
    token: str
    seconds: float
    memory_bytes: int
    namespaces: bool
    drop_root: bool
    interpreter: str
    folder: str | None
    group: str | None


def interpreter() -> str:
    """Which Python this is."""
    return f"{sys.prefix} {sys.version}"


def main() -> None:
    job = Job(**json.load(sys.stdin))
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        answer = {"outcome": supervised(job)}
    except Exception as error:
        answer = {"fault": f"{type(error).__name__}: {error}"}
    os.write(report, json.dumps(answer).encode())


# The supervisor


def supervised(job: Job) -> str:
    """Run the sample in a process of its own and return the verdict.

    Raises:
        OSError, RuntimeError: a protection could not be set up, or the machine failed.
    """
    if job.interpreter != interpreter():
        raise RuntimeError(f"started another interpreter ({interpreter()}) than {job.interpreter}")
    uid = confine.FIRST_FREE_UID + os.getpid()  # of nobody else: no other shares its processes, files or limits
    group = Group(job.group) if job.group else None
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    if job.namespaces:
        confine.enter_namespaces()
        become_first_process()
        confine.enter_private_root(readable_paths(), DISK_BYTES)
        if group and os.getuid():
            confine.deny_cgroup_namespaces()
    confine.guard_processes()
    channel = os.memfd_create("report")
    ready, starting = os.pipe()
    sample = os.fork()
    if not sample:
        sample_process(job, uid, group, channel, starting)
    os.close(starting)
    fault = os.read(ready, REPORT_BYTES)
    if fault:
        raise RuntimeError(fault.decode())
    try:
        verdict = Watch(job, sample, group).verdict()
    finally:
        end_descendants()
    report = os.pread(channel, REPORT_BYTES, 0)
    return verdict or (PASSED if report == job.token.encode() else reason(report, job.token))


def become_first_process() -> None:
    """Continue as the first process of the new namespace; the process outside waits for it."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    confine.die_with_parent()


def readable_paths() -> list[str]:
    """The interpreter's folders and the system's, without those inside another."""
    prefixes = {path for prefix in (sys.prefix, sys.base_prefix) for path in (prefix, os.path.realpath(prefix))}
    found: list[str] = []
    for path in (*confine.SYSTEM, *sorted(prefixes)):
        if os.path.lexists(path) and not any(path == each or path.startswith(f"{each}/") for each in found):
            found.append(path)
    return found


def reason(report: bytes, token: str) -> str:
    """The failure that a sample reports, in one line; untrusted text."""
    text = " ".join(report.decode(errors="replace").replace(token, "").split())
    return text if text.startswith("failed: ") else "failed: ended before its checks were through"


class Group:
    """A control group, also for a process that no longer sees its folder."""

    def __init__(self, folder: str) -> None:
        self.processes = os.open(f"{folder}/cgroup.procs", os.O_WRONLY)
        self.memory_events = os.open(f"{folder}/memory.events", os.O_RDONLY)

    def enter(self) -> None:
        """Move this process into the group."""
        os.write(self.processes, b"0")

    def kills(self) -> tuple[int, bool]:
        """How many of its processes the kernel has killed for want of memory, and whether the limit was its own."""
        lines = os.pread(self.memory_events, REPORT_BYTES, 0).decode().splitlines()
        events = {name: int(count) for name, count in map(str.split, lines)}
        return events["oom_kill"], bool(events["oom"])


class Watch:
    """Wait for a sample while adding up what it uses.

    Attributes:
        elapsed: seconds since the start, without pauses (of a virtual machine, or a job that another one preempts).
        waited: the longest that one of its processes has waited for a core, in seconds.
        lowest_disk: the least free space seen in the sample's folder, in bytes.
        next_look: when to measure the files in it again.
    """

    def __init__(self, job: Job, sample: int, group: Group | None) -> None:
        self.job, self.sample, self.group = job, sample, group
        self.last = time.monotonic()
        self.cores = len(os.sched_getaffinity(0))
        self.elapsed = self.waited = 0.0
        self.lowest_disk, self.next_look = DISK_BYTES, self.last
        self.kills = out_of_memory_kills()

    def verdict(self) -> str | None:
        """The limit that the sample exceeded, or None if it ended by itself.

        Raises:
            RuntimeError: the machine ran out of memory or disk, so how it ended says nothing about it.
        """
        while (status := reaped(self.sample)) is None:
            if exceeded := self.exceeded():
                return exceeded
            signal.sigtimedwait([signal.SIGCHLD], POLL)
        if self.exceeds_group():
            return self.too_much_memory
        if not self.group and os.WIFSIGNALED(status) and out_of_memory_kills() > self.kills:
            raise RuntimeError(NO_MEMORY)
        if status and self.lowest_disk < LOW_DISK_BYTES:
            raise RuntimeError(f"no space left in {self.job.folder}: set TMPDIR to a folder with more")
        return None

    def exceeded(self) -> str | None:
        """The limit that all of the sample's processes together exceed by now."""
        processes = [Usage(pid) for pid in descendants(os.getpid())]
        self.waited = max([self.waited, *(each.waited for each in processes)])
        finished = os.times()
        used = finished.children_user + finished.children_system + sum(each.cpu for each in processes)
        last, self.last = self.last, time.monotonic()
        self.elapsed += min(self.last - last, LONGEST_LOOK)
        if max(self.elapsed - self.waited, used / self.cores) > self.job.seconds:
            return TIMED_OUT
        if sum(each.threads for each in processes) > PROCESSES:
            return f"failed: more than {PROCESSES} processes and threads"
        together = sum(each.memory() for each in processes) if len(processes) > 1 else 0
        if self.exceeds_group() or together > self.job.memory_bytes:
            return self.too_much_memory
        if self.job.folder and self.exceeds_disk(self.job.folder):
            return f"failed: more than {DISK_BYTES >> 20} MB of files"
        return None

    @property
    def too_much_memory(self) -> str:
        return f"failed: MemoryError: its processes together use more than {self.job.memory_bytes >> 20} MB"

    def exceeds_group(self) -> bool:
        """Whether the kernel has killed processes of the sample because it exceeded its control group's memory.

        Raises:
            RuntimeError: it has killed some because the machine has no more.
        """
        killed, by_own_limit = self.group.kills() if self.group else (0, False)
        if killed and not by_own_limit:
            raise RuntimeError(NO_MEMORY)
        return killed > 0

    def exceeds_disk(self, folder: str) -> bool:
        """Whether the files in a folder are too large; looks less often the longer it takes."""
        self.lowest_disk = min(self.lowest_disk, free_bytes(folder))
        now = time.monotonic()
        if now < self.next_look:
            return False
        used = disk_usage(folder)
        self.next_look = now + 10 * (time.monotonic() - now)
        return used > DISK_BYTES


class Usage:
    """What one process uses; all zero once it has ended.

    Attributes:
        cpu: seconds of its threads and of its finished children.
        waited: seconds that its first thread waited for a core.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.cpu, self.threads, self.waited = pid, 0.0, 0, 0.0
        with suppress(OSError):
            # The name of the program, in parentheses, may contain anything; numbers of fields as in proc(5), from 3
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            self.cpu = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            self.threads = int(fields[17])
            self.waited = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9

    def memory(self) -> int:
        """Bytes in memory; shared ones are divided among those who share them, if it lets itself be inspected."""
        try:
            with suppress(PermissionError):
                lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
                return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it has ended
            return 0


def descendants(pid: int) -> Iterator[int]:
    """The children of a process, their children, and so on."""
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield int(child)
                yield from descendants(int(child))


def reaped(wanted: int) -> int | None:
    """Reap all children that have ended; return the wait status of the wanted one if it is among them."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found = ended[1] if ended[0] == wanted else found
    return found


def end_descendants() -> None:
    """Kill all descendants. They are stopped first, so that none can fork while others are killed.

    Raises:
        RuntimeError: some do not end.
    """
    stopped: set[int] = set()
    while new := set(descendants(os.getpid())) - stopped:
        send_signal(new, signal.SIGSTOP)
        stopped |= new
    send_signal(stopped, signal.SIGKILL)
    deadline = time.monotonic() + EXIT_SECONDS
    while reaped(0) or any(descendants(os.getpid())):
        if time.monotonic() > deadline:
            raise RuntimeError("the sample's processes do not end")
        signal.sigtimedwait([signal.SIGCHLD], POLL)


def send_signal(pids: set[int], number: int) -> None:
    """Send a signal to those processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed because memory ran out."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def free_bytes(folder: str) -> int:
    """What is left for files there."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize if state.f_favail or not state.f_files else 0


def disk_usage(folder: str) -> int:
    """Bytes of the files below a folder; what cannot be read is not counted."""
    total, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return total


# The sample's process


def sample_process(job: Job, uid: int, group: Group | None, channel: int, starting: int) -> NoReturn:
    """Restrict this process and run the sample. Failures up to the program's start are written to `starting`."""
    leave = os._exit
    try:
        try:
            if group:
                group.enter()
            restrict_process(job, uid, {channel, starting})
        except Exception as error:
            os.write(starting, f"{type(error).__name__}: {error}"[:REPORT_BYTES].encode())
            leave(1)
        os.close(starting)
        run_sample(job, channel)
    finally:
        leave(1)


def restrict_process(job: Job, uid: int, kept: set[int]) -> None:
    """Give up what a sample must not have: descriptors, rights, files, and more than its share."""
    os.setsid()
    confine.allow_inspection()
    rules = confine.landlock_rules(*accessible_paths(job))
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in {*kept, rules}:
            with suppress(OSError):  # the listing's own
                os.close(descriptor)
    if job.folder:
        os.chdir(job.folder)
    limit_resources(job)
    cores = some_cores(os.sched_getaffinity(0), uid)
    os.sched_setaffinity(0, cores)
    if job.drop_root:
        if job.folder:
            os.chown(job.folder, uid, uid)
        confine.become(uid)
    confine.die_with_parent()
    confine.drop_capabilities()
    if rules is not None:
        confine.enforce_landlock(rules)
    if confine.seccomp_available():
        confine.deny_calls(job.namespaces)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os.cpu_count = lambda: len(cores)


def some_cores(allowed: set[int], number: int) -> set[int]:
    """Those that a sample of this number may use; others have others."""
    start = number * CORES % len(allowed)
    return {*(2 * sorted(allowed))[start : start + CORES]}


def accessible_paths(job: Job) -> tuple[list[str], list[str]]:
    """What the sample may read and what it may write."""
    if job.folder is None:
        return ["/"], [os.devnull, *confine.SCRATCH]
    shared_memory = [path for path in ("/dev/shm",) if Path(path).is_dir()]
    return [*readable_paths(), "/proc", *confine.DEVICES], [os.devnull, job.folder, *shared_memory]


def limit_resources(job: Job) -> None:
    """Set the kernel's limits on each process, and on their number as far as the kernel can tell them apart."""
    limits = {
        resource.RLIMIT_AS: job.memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    own_user = job.drop_root or (job.namespaces and os.getuid())
    processes = PROCESSES if own_user else tasks_of_user() + SPARE_PROCESSES
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    limits[resource.RLIMIT_NPROC] = processes if most == resource.RLIM_INFINITY else min(processes, most)
    for number, value in limits.items():
        try:
            resource.setrlimit(number, (value, value))
        except ValueError as error:
            most = resource.getrlimit(number)[1]
            raise RuntimeError(f"samples need a limit of {value}, and here it is at most {most} (ulimit)") from error


def tasks_of_user() -> int:
    """How many processes and threads this user has."""
    threads = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                threads += Usage(int(entry.name)).threads
    return threads


def run_sample(job: Job, channel: int) -> None:
    """Run the program and its checks, and write the token or the failure to `channel`.

    Each is compiled on its own, so the program cannot comment out the checks. What this function still needs after the
    program has run is bound before, because the program can replace everything that it finds by name.
    """
    token, entry_point = job.token.encode(), job.entry_point
    write, leave, run, anything = os.write, os._exit, exec, BaseException
    module = ModuleType("__sample__")
    sys.modules[module.__name__] = module
    namespace = vars(module)
    try:
        program, test = (compile(source, name, "exec") for source, name in
                         ((job.program, "<sample>"), (job.test, "<test>")))  # fmt: skip
        run(program, namespace)
        run(test, namespace)
        namespace["check"](namespace[entry_point])
    except anything as error:
        write(channel, f"failed: {type(error).__name__}: {error}"[:500].encode(errors="replace"))
        leave(1)
    write(channel, token)
    leave(0)
