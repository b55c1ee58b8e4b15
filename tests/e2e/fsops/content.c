/* What files hold: holes, allocation, copies, appending, direct and synchronous I/O, files without a name. */
#include "fsops.h"

#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#define BLOCK 4096

static long long size_of(int fd) {
    struct stat stat;
    return fstat(fd, &stat) ? -1 : stat.st_size;
}

/* A new file of `blocks` blocks, each filled with its own letter from `a` on. */
static int lettered(const char *path, int blocks) {
    char block[BLOCK];
    int fd = file(path, "");
    for (int i = 0; i < blocks; i++) {
        memset(block, 'a' + i, BLOCK);
        if (write(fd, block, BLOCK) != BLOCK) say(path, "SHORT WRITE");
    }
    return fd;
}

/* The first letter of each block, `.` for a zero byte. */
static void say_blocks(const char *label, int fd) {
    char text[64] = "";
    int i = 0;
    for (; i < 60 && pread(fd, &text[i], 1, (off_t)i * BLOCK) == 1; i++)
        if (!text[i]) text[i] = '.';
    text[i] = 0;
    say(label, text[0] ? text : "-");
}

static void holes(void) {
    int fd = file("sparse", "");
    struct stat stat;
    TRY("sparse.write-far", pwrite(fd, "x", 1, 1 << 20));
    TRY("sparse.truncate-up", ftruncate(fd, 4 << 20));
    fsync(fd);
    fstat(fd, &stat);
    HOLDS("sparse.takes-little", stat.st_blocks < 64);
    NUMBER("sparse.data", lseek(fd, 0, SEEK_DATA));
    NUMBER("sparse.hole-at-0", lseek(fd, 0, SEEK_HOLE));
    NUMBER("sparse.hole-behind-data", lseek(fd, 1 << 20, SEEK_HOLE));
    NUMBER("sparse.data-behind-the-last", lseek(fd, 2 << 20, SEEK_DATA));
    NUMBER("sparse.data-beyond-the-end", lseek(fd, 5 << 20, SEEK_DATA));
    NUMBER("sparse.seek-end", lseek(fd, 0, SEEK_END));
    NUMBER("sparse.seek-negative", lseek(fd, -1, SEEK_SET));
    TRY("sparse.truncate-down", ftruncate(fd, 100));
    char byte = 'x';
    NUMBER("sparse.read-at-the-end", pread(fd, &byte, 1, 100));
    TRY("sparse.truncate-negative", ftruncate(fd, -1));
    close(fd);
    TRY("sparse.truncate-by-path", truncate("sparse", 5000));
    say_number("sparse.truncated-size", size_of(fd = open("sparse", O_RDONLY)));
    TRY("sparse.truncate-read-only", ftruncate(fd, 1));
    close(fd);
}

static void allocations(void) {
    int fd = lettered("allocated", 6);
    TRY("fallocate.grow", fallocate(fd, 0, 6 * BLOCK, 2 * BLOCK));
    say_number("fallocate.grown-size", size_of(fd));
    TRY("fallocate.keep-size", fallocate(fd, FALLOC_FL_KEEP_SIZE, 8 * BLOCK, BLOCK));
    say_number("fallocate.kept-size", size_of(fd));
    TRY("fallocate.punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, BLOCK, BLOCK));
    say_blocks("fallocate.punched", fd);
    TRY("fallocate.punch-without-keep-size", fallocate(fd, FALLOC_FL_PUNCH_HOLE, BLOCK, BLOCK));
    TRY("fallocate.zero", fallocate(fd, FALLOC_FL_ZERO_RANGE, 3 * BLOCK, BLOCK));
    say_blocks("fallocate.zeroed", fd);
    TRY("fallocate.collapse", fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, BLOCK, BLOCK));
    TRY("fallocate.insert", fallocate(fd, FALLOC_FL_INSERT_RANGE, BLOCK, BLOCK));
    TRY("fallocate.unshare", fallocate(fd, FALLOC_FL_UNSHARE_RANGE, 0, BLOCK));
    TRY("fallocate.no-length", fallocate(fd, 0, 0, 0));
    TRY("fallocate.posix", (errno = posix_fallocate(fd, 0, 10 * BLOCK)) ? -1 : 0);
    close(fd);
    fd = open("allocated", O_RDONLY);
    TRY("fallocate.read-only", fallocate(fd, 0, 0, BLOCK));
    close(fd);
}

static void copies(void) {
    int from = lettered("from", 5), to = file("to", "");
    loff_t in = BLOCK, out = 0;
    NUMBER("copy.range", copy_file_range(from, &in, to, &out, 2 * BLOCK, 0));
    say_blocks("copy.copied", to);
    in = 4 * BLOCK;
    NUMBER("copy.up-to-the-end", copy_file_range(from, &in, to, &out, 10 * BLOCK, 0));
    NUMBER("copy.at-the-end", copy_file_range(from, &in, to, &out, BLOCK, 0));
    in = 0, out = BLOCK;
    TRY("copy.onto-itself-overlapping", copy_file_range(from, &in, from, &out, 2 * BLOCK, 0));
    in = 0, out = 10 * BLOCK;
    NUMBER("copy.within-a-file", copy_file_range(from, &in, from, &out, BLOCK, 0));
    TRY("copy.flags", copy_file_range(from, NULL, to, NULL, 1, 1));
    lseek(from, 0, SEEK_SET);
    NUMBER("copy.sendfile", sendfile(to, from, NULL, BLOCK));
    TRY("copy.ficlone", ioctl(to, FICLONE, from));
    int reading = open("to", O_RDONLY);
    TRY("copy.to-read-only", copy_file_range(from, NULL, reading, NULL, 1, 0));
    int appending = open("to", O_WRONLY | O_APPEND);
    TRY("copy.to-appending", copy_file_range(from, NULL, appending, NULL, 1, 0));
    close(from), close(to), close(reading), close(appending);
}

static void appends(void) {
    char path[4096], line[202];
    int fd = file("log", "");
    close(fd);
    fd = open("log", O_RDWR | O_APPEND);
    PEER("append.peer-open", "open %d %s/log", O_RDWR | O_APPEND, getcwd(path, sizeof path));
    peer_send("append 40 p");
    char record[101];
    memset(record, 'm', 100);
    record[100] = '\n';
    for (int i = 0; i < 40; i++)
        if (write(fd, record, sizeof record) != sizeof record) say("append.write", strerrorname_np(errno));
    say_number("append.peer-records", peer_answer());
    say_number("append.size", size_of(fd));
    FILE *log = fopen("log", "r");
    int whole = 0;
    while (fgets(line, sizeof line, log)) {
        line[strcspn(line, "\n")] = 0;
        whole += strlen(line) == 100 && strspn(line, line[0] == 'm' ? "m" : "p") == 100;
    }
    fclose(log);
    say_number("append.whole-records", whole);
    NUMBER("append.pwrite-goes-to-the-end", pwrite(fd, "end", 3, 0));
    say_number("append.grown", size_of(fd));
    write(fd, "end", 3);
    NUMBER("append.position", lseek(fd, 0, SEEK_CUR));
    TRY("append.flag-off", fcntl(fd, F_SETFL, 0));
    NUMBER("append.off-pwrite", pwrite(fd, "MMM", 3, 0));
    HOLDS("append.off-written-in-place", !strncmp(contents("log"), "MMM", 3));
    TRY("append.flag-on", fcntl(fd, F_SETFL, O_APPEND));
    NUMBER("append.on-pwrite", pwrite(fd, "end", 3, 0));
    say_number("append.on-grown", size_of(fd));
    struct iovec vector = {.iov_base = "rwf", .iov_len = 3};
    int plain = open("log", O_WRONLY);
    NUMBER("append.rwf-dsync", pwritev2(plain, &vector, 1, 0, RWF_DSYNC));
    PEER("append.close", "close");
    close(plain), close(fd);
}

static void direct(void) {
    char *block = aligned_alloc(BLOCK, 2 * BLOCK);
    int fd = open("direct", O_RDWR | O_CREAT | O_DIRECT, 0644);
    TRY("direct.open", fd);
    if (fd < 0) return;
    memset(block, 'd', 2 * BLOCK);
    NUMBER("direct.write", pwrite(fd, block, BLOCK, 0));
    memset(block, 0, BLOCK);
    NUMBER("direct.read", pread(fd, block, BLOCK, 0));
    HOLDS("direct.same", block[0] == 'd' && block[BLOCK - 1] == 'd');
    HOLDS("direct.seen-by-others", contents("direct")[100] == 'd');
    int cached = open("direct", O_RDWR);
    pwrite(cached, "C", 1, 10);
    NUMBER("direct.read-after-cached-write", pread(fd, block, BLOCK, 0));
    HOLDS("direct.sees-cached-write", block[10] == 'C');
    NUMBER("direct.read-beyond-the-end", pread(fd, block, BLOCK, BLOCK));
    NUMBER("direct.odd-offset", pread(fd, block, BLOCK, 7));
    NUMBER("direct.odd-length", pwrite(fd, block, 100, 0));
    NUMBER("direct.odd-memory", pwrite(fd, block + 1, BLOCK, 0));
    close(cached), close(fd);
    free(block);
}

static void nameless(void) {
    char path[32];
    struct stat stat;
    int fd = open(".", O_TMPFILE | O_RDWR, 0640);
    TRY("tmpfile.open", fd);
    if (fd < 0) return;
    fstat(fd, &stat);
    say_number("tmpfile.links", stat.st_nlink);
    NUMBER("tmpfile.write", write(fd, "tmp", 3));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    TRY("tmpfile.link", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    HOLDS("tmpfile.named", !strcmp(contents("named"), "tmp"));
    fstat(fd, &stat);
    say_number("tmpfile.links-named", stat.st_nlink);
    say_mode("tmpfile.mode", "named");
    close(fd);
    fd = open(".", O_TMPFILE | O_RDWR | O_EXCL, 0640);
    TRY("tmpfile.exclusive", fd);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    TRY("tmpfile.exclusive-link", linkat(AT_FDCWD, path, AT_FDCWD, "never", AT_SYMLINK_FOLLOW));
    close(fd);
    fd = open(".", O_TMPFILE | O_WRONLY, 0644);
    TRY("tmpfile.write-only", fd);
    TRY("tmpfile.read-only", open(".", O_TMPFILE | O_RDONLY, 0644));
    close(fd);
}

static void syncs(void) {
    int fd = open("synced", O_RDWR | O_CREAT | O_SYNC, 0644);
    NUMBER("sync.o-sync", write(fd, "synced", 6));
    TRY("sync.fsync", fsync(fd));
    TRY("sync.fdatasync", fdatasync(fd));
    TRY("sync.syncfs", syncfs(fd));
    TRY("sync.range", sync_file_range(fd, 0, 6, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER));
    TRY("sync.readahead", readahead(fd, 0, 6));
    TRY("sync.fadvise", (errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)) ? -1 : 0);
    char text[8] = "";
    NUMBER("sync.read-after-dontneed", pread(fd, text, 6, 0));
    close(fd);
    fd = open("synced", O_RDONLY);
    TRY("sync.fsync-read-only", fsync(fd));
    TRY("sync.write-read-only", write(fd, "x", 1));
    close(fd);
    fd = open(".", O_RDONLY | O_DIRECTORY);
    TRY("sync.directory", fsync(fd));
    TRY("sync.read-directory", read(fd, text, 1));
    close(fd);
    fd = open("synced", O_WRONLY);
    TRY("sync.read-write-only", read(fd, text, 1));
    NUMBER("sync.write-nothing", write(fd, "", 0));
    NUMBER("sync.write-beyond-what-fits", pwrite(fd, "x", 1, INT64_MAX));
    struct iovec vectors[3] = {{"one", 3}, {"", 0}, {"two", 3}};
    NUMBER("sync.writev", writev(fd, vectors, 3));
    TRY("sync.truncating-open", open("synced", O_WRONLY | O_TRUNC));
    say_number("sync.truncated", size_of(fd));
    close(fd);
}

void content(void) {
    holes();
    allocations();
    copies();
    appends();
    direct();
    nameless();
    syncs();
}
