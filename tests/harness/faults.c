/* A disk that refuses, by LD_PRELOAD: calls that write below a folder are counted over all processes, and some fail.

   FAULTS names a control file, mapped by every process; its layout is `struct control`, which faults.py fills. Calls
   are those that write: open for writing, write, rename, link, mkdir, truncate, sync, a shared mapping that can be
   written to; with `reads`, those that read, too. The call number `first` (of those whose path below the folder fits
   `like`, made by a process that is meant) fails with `error`; with `ever`, so does every call below the folder that
   comes after it, whoever makes it, and of a disk that is full no room is told. Where `error` is negative the process
   ends, in one of the ways that it names. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXIT_3 (-1001)
#define HANG (-1002)
#define NO_MEMORY (-1003)

struct control {
    int64_t count, failed, first, ever, error, reads;
    int64_t only[4];   /* pids of the processes that are meant; none: all */
    int64_t others;    /* 1: all but those are */
    char below[1024], like[512], log[1024];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTS");
    if (!name || control) return;
    long file = syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return;
    void *at = (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, (int)file, 0L);
    syscall(SYS_close, (int)file);
    if (at != MAP_FAILED) control = at;
}

static int meant(void) {
    int64_t me = syscall(SYS_getpid);
    for (int i = 0; i < 4 && control->only[i]; i++)
        if (control->only[i] == me) return !control->others;
    return control->others || !control->only[0];
}

static void note(int64_t number, const char *call, const char *path) {
    char line[2 * PATH_MAX];
    long file = syscall(SYS_openat, AT_FDCWD, control->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0) return;
    int length = snprintf(line, sizeof line, "%ld\t%ld\t%s\t%s\n", (long)number, (long)syscall(SYS_getpid), call, path);
    syscall(SYS_write, (int)file, line, (size_t)length);
    syscall(SYS_close, (int)file);
}

static void no_memory(void) {
    char text[64] = "";
    long file = syscall(SYS_openat, AT_FDCWD, "/proc/self/statm", O_RDONLY, 0);
    syscall(SYS_read, (int)file, text, sizeof text - 1);
    syscall(SYS_close, (int)file);
    rlim_t now = strtoul(text, NULL, 10) * (rlim_t)sysconf(_SC_PAGESIZE);
    struct rlimit limit = {now, now};
    setrlimit(RLIMIT_AS, &limit);
}

/* Whether a call on a path is to fail; errno is set then. */
static int fails(const char *call, const char *path) {
    if (!control || !control->below[0]) return 0;
    size_t length = strlen(control->below);
    if (strncmp(path, control->below, length) || (path[length] != '/' && path[length])) return 0;
    if (control->ever && control->failed) { errno = (int)control->error; return 1; }
    if (!meant()) return 0;
    if (control->like[0] && fnmatch(control->like, path + length + (path[length] == '/'), 0)) return 0;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (control->log[0]) note(number, call, path + length);
    if (number != control->first) return 0;
    __atomic_add_fetch(&control->failed, 1, __ATOMIC_SEQ_CST);
    int64_t error = control->error;
    if (error == EXIT_3) syscall(SYS_exit_group, 3);
    if (error == HANG) for (;;) sleep(60);
    if (error == NO_MEMORY) { no_memory(); return 0; }
    if (error < 0) { signal((int)-error, SIG_DFL); kill((pid_t)syscall(SYS_getpid), (int)-error); for (;;) sleep(60); }
    errno = (int)error;
    return 1;
}

static int fails_at(const char *call, int folder, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (!control || !path) return 0;
    if (path[0] == '/') return fails(call, path);
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, full, (size_t)PATH_MAX);
    if (length <= 0) return 0;
    snprintf(full + length, sizeof full - (size_t)length, "/%s", path);
    return fails(call, full);
}

static int fails_fd(const char *call, int file) {
    char full[PATH_MAX + 1], link[64];
    if (!control || file < 0) return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, full, (size_t)PATH_MAX);
    errno = kept;
    if (length <= 0 || full[0] != '/') return 0;
    full[length] = 0;
    return fails(call, full);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int for_writing(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

static int open_fails(int folder, const char *path, int flags) {
    if (for_writing(flags)) return fails_at("open", folder, path);
    return control && control->reads && !(flags & O_DIRECTORY) && fails_at("read-open", folder, path);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); MODE(flags) \
        return open_fails(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); MODE(flags) \
        return open_fails(folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }
#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(FILE *, name, const char *, const char *); \
        return strpbrk(how, "wa+") && fails_at("open", AT_FDCWD, path) ? NULL : real(path, how); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define BY_FD(type, name, call, parameters, arguments, ...) \
    type name parameters { \
        REAL(type, name, __VA_ARGS__); \
        return fails_fd(call, file) ? (type)-1 : real arguments; \
    }
BY_FD(ssize_t, write, "write", (int file, const void *from, size_t size), (file, from, size),
      int, const void *, size_t)
BY_FD(ssize_t, pwrite, "write", (int file, const void *from, size_t size, off_t at), (file, from, size, at),
      int, const void *, size_t, off_t)
BY_FD(ssize_t, pwrite64, "write", (int file, const void *from, size_t size, off64_t at), (file, from, size, at),
      int, const void *, size_t, off64_t)
BY_FD(ssize_t, writev, "write", (int file, const struct iovec *from, int count), (file, from, count),
      int, const struct iovec *, int)
BY_FD(ssize_t, pwritev, "write", (int file, const struct iovec *from, int count, off_t at), (file, from, count, at),
      int, const struct iovec *, int, off_t)
BY_FD(ssize_t, sendfile, "write", (int file, int from, off_t *at, size_t size), (file, from, at, size),
      int, int, off_t *, size_t)
BY_FD(ssize_t, sendfile64, "write", (int file, int from, off64_t *at, size_t size), (file, from, at, size),
      int, int, off64_t *, size_t)
BY_FD(int, ftruncate, "truncate", (int file, off_t size), (file, size), int, off_t)
BY_FD(int, ftruncate64, "truncate", (int file, off64_t size), (file, size), int, off64_t)
BY_FD(int, fallocate, "truncate", (int file, int how, off_t at, off_t size), (file, how, at, size),
      int, int, off_t, off_t)
BY_FD(int, fsync, "sync", (int file), (file), int)
BY_FD(int, fdatasync, "sync", (int file), (file), int)

ssize_t copy_file_range(int from, off64_t *here, int file, off64_t *there, size_t size, unsigned int flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned int);
    return fails_fd("write", file) ? -1 : real(from, here, file, there, size, flags);
}

ssize_t read(int file, void *to, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    return control && control->reads && fails_fd("read", file) ? -1 : real(file, to, size);
}

#define MMAP(name, offset) \
    void *name(void *at, size_t size, int protection, int flags, int file, offset from) { \
        REAL(void *, name, void *, size_t, int, int, int, offset); \
        int writes = flags & MAP_SHARED && protection & PROT_WRITE; \
        return writes && fails_fd("map", file) ? MAP_FAILED : real(at, size, protection, flags, file, from); \
    }
MMAP(mmap, off_t) MMAP(mmap64, off64_t)

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return fails_at("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return fails_at("mkdir", folder, path) ? -1 : real(folder, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return fails_at("rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int old, const char *from, int folder, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    return fails_at("rename", folder, to) ? -1 : real(old, from, folder, to);
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    return fails_at("link", AT_FDCWD, to) ? -1 : real(from, to);
}
int linkat(int old, const char *from, int folder, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    return fails_at("link", folder, to) ? -1 : real(old, from, folder, to, flags);
}
int symlink(const char *from, const char *to) {
    REAL(int, symlink, const char *, const char *);
    return fails_at("link", AT_FDCWD, to) ? -1 : real(from, to);
}
int symlinkat(const char *from, int folder, const char *to) {
    REAL(int, symlinkat, const char *, int, const char *);
    return fails_at("link", folder, to) ? -1 : real(from, folder, to);
}

#define STATVFS(name, type) \
    int name(const char *path, struct type *to) { \
        REAL(int, name, const char *, struct type *); \
        int result = real(path, to); \
        if (!result && control && control->ever && control->failed && control->error == ENOSPC) to->f_bavail = 0; \
        return result; \
    }
STATVFS(statvfs, statvfs) STATVFS(statvfs64, statvfs64)
