/* Extended attributes, ACLs, file capabilities and set-user-id programs. */
#include "fsops.h"

#include <sys/wait.h>
#include <sys/xattr.h>

static void say_attribute(const char *label, const char *path, const char *name) {
    char value[256];
    ssize_t length = lgetxattr(path, name, value, sizeof value - 1);
    if (length < 0) { say(label, strerrorname_np(errno)); return; }
    value[length] = 0;
    say(label, length ? value : "-");
}

static void simple(void) {
    char value[65537], list[4096];
    close(file("x", "x"));
    mkdir("d", 0755);
    symlink("x", "s");
    TRY("xattr.user", setxattr("x", "user.a", "value", 5, 0));
    say_attribute("xattr.user-value", "x", "user.a");
    TRY("xattr.create-taken", setxattr("x", "user.a", "v", 1, XATTR_CREATE));
    TRY("xattr.replace-missing", setxattr("x", "user.b", "v", 1, XATTR_REPLACE));
    TRY("xattr.empty", setxattr("x", "user.empty", "", 0, 0));
    say_attribute("xattr.empty-value", "x", "user.empty");
    NUMBER("xattr.size", getxattr("x", "user.a", NULL, 0));
    NUMBER("xattr.short-buffer", getxattr("x", "user.a", value, 2));
    TRY("xattr.missing", getxattr("x", "user.none", value, 10));
    TRY("xattr.no-namespace", setxattr("x", "plain", "v", 1, 0));
    TRY("xattr.no-name", setxattr("x", "user.", "v", 1, 0));
    TRY("xattr.directory", setxattr("d", "user.a", "v", 1, 0));
    TRY("xattr.symlink", lsetxattr("s", "user.a", "v", 1, 0));
    TRY("xattr.remove", removexattr("x", "user.empty"));
    TRY("xattr.remove-missing", removexattr("x", "user.empty"));
    int fd = open("x", O_RDWR);
    TRY("xattr.by-descriptor", fsetxattr(fd, "user.fd", "v", 1, 0));
    close(fd);
    ssize_t length = listxattr("x", list, sizeof list);
    int users = 0;
    for (ssize_t at = 0; at < length; at += strlen(list + at) + 1) users += !strncmp(list + at, "user.", 5);
    say_number("xattr.listed", users);
    char name[300] = "user.";
    memset(name + 5, 'n', 290);
    name[256] = 0;
    TRY("xattr.name-256", setxattr("x", name, "v", 1, 0));
    name[255] = 0;
    TRY("xattr.name-255", setxattr("x", name, "v", 1, 0));
    memset(value, 'v', sizeof value);
    TRY("xattr.value-3000", setxattr("d", "user.long", value, 3000, 0));
    TRY("xattr.value-65537", setxattr("x", "user.long", value, 65537, 0));
    TRY("xattr.trusted", setxattr("x", "trusted.a", "v", 1, 0));
    TRY("xattr.trusted-get", getxattr("x", "trusted.none", value, 10));
    TRY("xattr.security", setxattr("x", "security.test", "v", 1, 0));
    TRY("xattr.system", setxattr("x", "system.test", "v", 1, 0));
    TRY("xattr.overlay-whiteout", setxattr("d", "user.overlay.opaque", "y", 1, 0));
}

/* An ACL as the kernel takes it: version 2, then tag, permissions, id. (include/uapi/linux/posix_acl_xattr.h) */
struct acl {
    uint32_t version;
    struct { uint16_t tag, permissions; uint32_t id; } entry[5];
};

static const struct acl for_user_1000 = {2, {{1, 6, -1}, {2, 7, 1000}, {4, 0, -1}, {16, 7, -1}, {32, 0, -1}}};

static void reads_by_acl(void) {
    TRY("acl.user-reads", open("acl", O_RDONLY));
}

static void makes_in_default(void) {
    umask(077);
    close(open("default/file", O_CREAT | O_WRONLY, 0666));
    mkdir("default/dir", 0777);
    mkfifo("default/fifo", 0666);
}

static void acls(void) {
    char value[256];
    close(file("acl", "x"));
    chmod("acl", 0600);
    as(1000, 1000, reads_by_acl);
    TRY("acl.set", setxattr("acl", "system.posix_acl_access", &for_user_1000, sizeof for_user_1000, 0));
    say_mode("acl.mode", "acl");
    as(1000, 1000, reads_by_acl);
    chmod("acl", 0600);
    say_mode("acl.mode-without-mask", "acl");
    as(1000, 1000, reads_by_acl);
    NUMBER("acl.get", getxattr("acl", "system.posix_acl_access", value, sizeof value));
    TRY("acl.malformed", setxattr("acl", "system.posix_acl_access", "malformed", 9, 0));
    TRY("acl.default-on-file", setxattr("acl", "system.posix_acl_default", &for_user_1000, sizeof for_user_1000, 0));
    TRY("acl.remove", removexattr("acl", "system.posix_acl_access"));
    NUMBER("acl.removed", getxattr("acl", "system.posix_acl_access", value, sizeof value));
    mkdir("default", 0777);
    chmod("default", 0777);
    TRY("acl.default", setxattr("default", "system.posix_acl_default", &for_user_1000, sizeof for_user_1000, 0));
    as(1001, 1001, makes_in_default);
    say_mode("acl.default-file", "default/file");
    say_mode("acl.default-dir", "default/dir");
    say_mode("acl.default-fifo", "default/fifo");
    NUMBER("acl.default-inherited-access", getxattr("default/file", "system.posix_acl_access", value, sizeof value));
    NUMBER("acl.default-inherited-default", getxattr("default/dir", "system.posix_acl_default", value, sizeof value));
}

static void copy_self(const char *path) {
    char buffer[65536];
    ssize_t length;
    int from = open(self, O_RDONLY), to = open(path, O_CREAT | O_WRONLY, 0755);
    while ((length = read(from, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, length) != length) say(path, "SHORT WRITE");
    close(from), close(to);
}

static const char *program;

static void runs_program(void) {
    char line[128] = "nothing";
    int ends[2];
    if (pipe(ends)) return;
    if (fork() == 0) {
        dup2(ends[1], 1);
        execl(program, program, "show-ids", NULL);
        dprintf(1, "%s", strerrorname_np(errno));
        _exit(1);
    }
    close(ends[1]);
    ssize_t length = read(ends[0], line, sizeof line - 1);
    if (length > 0) line[length] = 0;
    line[strcspn(line, "\n")] = 0;
    say("program.became", line);
    wait(NULL);
}

/* vfs_cap_data, revision 2 (include/uapi/linux/capability.h): CAP_NET_BIND_SERVICE permitted and effective. */
static const struct { uint32_t magic, permitted, inheritable, permitted_high, inheritable_high; } bind_service = {0x02000001, 1 << 10, 0, 0, 0};

static void writes_capable(void) {
    int fd = open("capable", O_WRONLY);
    TRY("capability.write-as-user", write(fd, "\x7f", 1));
    close(fd);
}

static void programs(void) {
    char value[64];
    copy_self(program = "capable");
    as(1000, 1000, runs_program);
    TRY("capability.set", setxattr("capable", "security.capability", &bind_service, sizeof bind_service, 0));
    NUMBER("capability.get", getxattr("capable", "security.capability", value, sizeof value));
    as(1000, 1000, runs_program);
    chmod("capable", 0757);
    as(1000, 1000, writes_capable);
    NUMBER("capability.gone-after-write", getxattr("capable", "security.capability", value, sizeof value));
    setxattr("capable", "security.capability", &bind_service, sizeof bind_service, 0);
    chown("capable", 1000, 1000);
    NUMBER("capability.gone-after-chown", getxattr("capable", "security.capability", value, sizeof value));
    copy_self(program = "set-id");
    chown("set-id", 7, 8);
    chmod("set-id", 06755);
    as(1000, 1000, runs_program);
    int fd = open("set-id", O_WRONLY);
    TRY("program.not-busy", fd);
    if (fd >= 0) { as(1000, 1000, runs_program); close(fd); } /* ETXTBSY */
    chmod("set-id", 0644);
    as(1000, 1000, runs_program);
    close(file("script", "#!/no/such/interpreter\n"));
    chmod("script", 0755);
    program = "./script";
    as(1000, 1000, runs_program);
}

void extended(void) {
    simple();
    acls();
    programs();
}
