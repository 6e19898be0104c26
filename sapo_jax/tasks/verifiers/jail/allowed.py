"""What a program may do on the real machine, in words: all else is refused."""

# System calls.
CALLS = """
read write readv writev pread64 pwrite64 close close_range lseek fstat newfstatat stat lstat statx
statfs fstatfs access faccessat faccessat2 open openat readlink readlinkat getdents64 getcwd dup
dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait
fcntl ftruncate truncate fsync fdatasync fadvise64 unlink unlinkat rename renameat renameat2
sendfile copy_file_range mmap mprotect munmap mremap madvise brk rt_sigaction rt_sigprocmask
rt_sigreturn rt_sigtimedwait sigaltstack pause futex set_robust_list rseq set_tid_address
sched_yield sched_getaffinity arch_prctl getrlimit setrlimit getrusage times sysinfo uname
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getitimer setitimer alarm
getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp
getrandom restart_syscall exit exit_group
"""

# Audit events of Python.
EVENTS = """
import open compile exec os.listdir os.scandir os.remove os.rename os.truncate os.putenv os.unsetenv
builtins.input builtins.input/result builtins.id object.__getattr__ object.__setattr__
object.__delattr__ function.__new__ array.__new__ pickle.find_class marshal.load marshal.loads
marshal.dumps time.sleep os.walk os.fwalk glob.glob pathlib.Path.glob pathlib.Path.rglob
tempfile.mkstemp tempfile.mkdtemp sys._getframe sys._getframemodulename sys.excepthook
sys.unraisablehook resource.setrlimit cpython._PySys_ClearAuditHooks
"""
THREADS = "_thread.start_new_thread _thread.start_joinable_thread"

# Modules of native code; those that are not here open files and start processes unaudited.
NATIVE = """
_abc _ast _asyncio _bisect _blake2 _bz2 _codecs _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp
_codecs_kr _codecs_tw _collections _contextvars _csv _datetime _decimal _elementtree _functools
_hashlib _heapq _io _json _locale _lzma _md5 _multibytecodec _opcode _opcode_metadata _operator
_pickle _queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _signal _sre _stat _statistics _string
_struct _suggestions _symtable _sysconfig _thread _tokenize _typing _uuid _warnings _weakref
_zoneinfo array atexit binascii builtins cmath errno gc itertools marshal math pyexpat select sys
time unicodedata zlib
"""

# Functions of ``os`` that raise no audit event: these are taken away.
UNAUDITED = """
chroot forkpty initgroups login_tty memfd_create mkfifo mknod nice openpty pidfd_open posix_openpt
sched_setaffinity sched_setparam sched_setscheduler setegid seteuid setgid setgroups setns setpgid
setpgrp setpriority setregid setresgid setresuid setreuid setsid setuid sync tcsetpgrp unshare
"""
