/* Sockets, FIFOs, devices, inotify, file handles, ioctls. */
#include "fsops.h"

#include <linux/fs.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>

static void sockets(void) {
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "socket"};
    struct stat stat;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    TRY("socket.bind", bind(listener, (struct sockaddr *)&name, sizeof name));
    lstat("socket", &stat);
    HOLDS("socket.is-one", S_ISSOCK(stat.st_mode));
    TRY("socket.connect-unheard", connect(client, (struct sockaddr *)&name, sizeof name));
    listen(listener, 1);
    TRY("socket.connect", connect(client, (struct sockaddr *)&name, sizeof name));
    TRY("socket.bind-taken", bind(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&name, sizeof name));
    TRY("socket.open", open("socket", O_RDWR));
    TRY("socket.rename", rename("socket", "socket2"));
    close(client);
    client = socket(AF_UNIX, SOCK_STREAM, 0);
    strcpy(name.sun_path, "socket2");
    TRY("socket.connect-renamed", connect(client, (struct sockaddr *)&name, sizeof name));
    close(client), close(listener);
    client = socket(AF_UNIX, SOCK_STREAM, 0);
    TRY("socket.connect-closed", connect(client, (struct sockaddr *)&name, sizeof name));
    TRY("socket.unlink", unlink("socket2"));
    close(client);
}

static void fifos(void) {
    char text[8] = "";
    TRY("fifo.make", mkfifo("fifo", 0644));
    TRY("fifo.write-unheard", open("fifo", O_WRONLY | O_NONBLOCK));
    if (fork() == 0) {
        int fd = open("fifo", O_WRONLY);
        write(fd, "fifo", 4);
        _exit(0);
    }
    int fd = open("fifo", O_RDONLY);
    NUMBER("fifo.read", read(fd, text, 8));
    NUMBER("fifo.end", read(fd, text, 8));
    TRY("fifo.seek", lseek(fd, 0, SEEK_SET));
    close(fd);
    wait(NULL);
}

static void devices(void) {
    struct stat stat;
    TRY("device.null", mknod("null", S_IFCHR | 0666, makedev(1, 3)));
    TRY("device.block", mknod("block", S_IFBLK | 0600, makedev(7, 0)));
    TRY("device.whiteout", mknod("whiteout", S_IFCHR, 0));
    if (lstat("null", &stat) == 0) {
        HOLDS("device.null-number", stat.st_rdev == makedev(1, 3));
        int fd = open("null", O_RDWR);
        NUMBER("device.null-write", write(fd, "x", 1));
        close(fd);
    }
    TRY("device.regular", mknod("regular", S_IFREG | 0644, 0));
    TRY("device.directory", mknod("directory", S_IFDIR | 0755, 0));
}

static void watches(void) {
    char events[4096] __attribute__((aligned(8)));
    int fd = inotify_init1(IN_NONBLOCK), count = 0;
    uint32_t seen = 0;
    TRY("inotify.watch", inotify_add_watch(fd, ".", IN_CREATE | IN_DELETE | IN_MODIFY | IN_MOVED_FROM | IN_MOVED_TO | IN_CLOSE_WRITE | IN_ATTRIB));
    close(file("watched", "x"));
    chmod("watched", 0600);
    rename("watched", "watched2");
    unlink("watched2");
    ssize_t length = read(fd, events, sizeof events);
    for (char *at = events; at < events + (length > 0 ? length : 0); count++) {
        struct inotify_event *event = (struct inotify_event *)at;
        seen |= event->mask;
        at += sizeof *event + event->len;
    }
    say_number("inotify.events", count);
    say_number("inotify.kinds", seen);
    close(file("self", "x"));
    TRY("inotify.watch-file", inotify_add_watch(fd, "self", IN_DELETE_SELF | IN_ATTRIB));
    unlink("self");
    HOLDS("inotify.delete-self", read(fd, events, sizeof events) > 0);
    close(fd);
}

static void handles(void) {
    union { struct file_handle handle; char room[sizeof(struct file_handle) + MAX_HANDLE_SZ]; } it = {.handle.handle_bytes = MAX_HANDLE_SZ};
    int mount, here = open(".", O_RDONLY | O_DIRECTORY);
    close(file("handle", "x"));
    TRY("handle.name", name_to_handle_at(AT_FDCWD, "handle", &it.handle, &mount, 0));
    TRY("handle.open", open_by_handle_at(here, &it.handle, O_RDONLY));
    close(here);
}

static void ioctls(void) {
    int flags = 0, fd = file("ioctl", "x"), bytes = 0;
    long version = 0;
    struct fsxattr extended;
    TRY("ioctl.get-flags", ioctl(fd, FS_IOC_GETFLAGS, &flags));
    flags = FS_NODUMP_FL;
    TRY("ioctl.set-flags", ioctl(fd, FS_IOC_SETFLAGS, &flags));
    TRY("ioctl.get-xattr", ioctl(fd, FS_IOC_FSGETXATTR, &extended));
    TRY("ioctl.get-version", ioctl(fd, FS_IOC_GETVERSION, &version));
    TRY("ioctl.fionread", ioctl(fd, FIONREAD, &bytes));
    TRY("ioctl.fibmap", ioctl(fd, FIBMAP, &flags));
    TRY("ioctl.figetbsz", ioctl(fd, FIGETBSZ, &flags));
    char terminal[64];
    TRY("ioctl.tty", ioctl(fd, TCGETS, terminal));
    struct pollfd wait = {.fd = fd, .events = POLLIN | POLLOUT};
    NUMBER("poll.file", poll(&wait, 1, 0));
    say_number("poll.file-ready", wait.revents);
    close(fd);
}

void special(void) {
    sockets();
    fifos();
    devices();
    watches();
    handles();
    ioctls();
}
