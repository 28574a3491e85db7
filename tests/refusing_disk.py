"""A disk that refuses: a library, loaded before the C library, whose calls fail as the environment says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# The environment names an errno for each kind of call; it is read at every call, so it may change.
# DISK_FOLDER_FSYNC, DISK_FILE_FSYNC: fsync and fdatasync of a folder, of a file; DISK_FOLDER_OPEN: opening a
# folder as a file; DISK_READ="ERRNO PART": reading a file that has PART in its path.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }

static int refuses_sync(int fd) {
    struct stat about;
    if (fstat(fd, &about)) return 0;
    return number(S_ISDIR(about.st_mode) ? "DISK_FOLDER_FSYNC" : "DISK_FILE_FSYNC");
}
#define SYNC(NAME) int NAME(int fd) { \
    int refused = refuses_sync(fd); \
    if (refused) { errno = refused; return -1; } \
    int (*real)(int) = dlsym(RTLD_NEXT, #NAME); return real(fd); }
SYNC(fsync)
SYNC(fdatasync)

static int refuses_open(const char *path, int flags) {
    struct stat about;
    int refused = number("DISK_FOLDER_OPEN");
    return refused && !(flags & O_CLOEXEC && flags & O_NONBLOCK) /* not opendir */
        && !stat(path, &about) && S_ISDIR(about.st_mode) ? refused : 0;
}
#define OPEN(NAME) int NAME(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
    int refused = refuses_open(path, flags); \
    if (refused) { errno = refused; return -1; } \
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #NAME); return real(path, flags, mode); }
OPEN(open)
OPEN(open64)

static int refuses_read(int fd) {
    const char *text = getenv("DISK_READ");
    char link[64], path[4096];
    if (!text) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, strchr(text, ' ') + 1) ? atoi(text) : 0;
}
ssize_t read(int fd, void *into, size_t size) {
    int refused = refuses_read(fd);
    if (refused) { errno = refused; return -1; }
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read"); return real(fd, into, size);
}
"""


def build(folder: Path) -> Path:
    """Compile the library into a folder; skip the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "disk.c", folder / "disk.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
