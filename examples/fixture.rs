//! A worker for the tests, with the good and the bad habits of real ones: `fixture MODE [OPTION…]`.
//!
//! It listens on `$PORT` of 127.0.0.1, or on descriptor 3, TCP or unix, where `LISTEN_FDS` says so.
//!
//! | mode | does |
//! | --- | --- |
//! | `http` | answers GET, keeps connections alive; see [`page`] for what the paths do |
//! | `echo` | sends back what comes, and ends its side when the client ends its own |
//! | `tell VERSION` | says the PROXY header (see `--proxy`) in a line of its own, then is `echo` |
//! | `reset` | resets each connection after the first bytes |
//! | `pour BYTES` | after the first bytes, sends so many and resets the connection |
//! | `closing FILE` | accepts until FILE exists, then listens no more, makes FILE.done, and lives on |
//! | `hear FILE` | says `bye` after the first bytes and ends its side; writes all it heard, or the error, to FILE |
//! | `deaf` | accepts, and never reads |
//! | `stalling FILE` | accepts until FILE exists, then never again: its queue is full when there is FILE.done, and whoever connects later hangs |
//! | `slow MILLIS BACKLOG` | answers one request after the other, each after that time, with a queue for so many connections |
//! | `forget` | reads a request, and ends the connection without an answer |
//! | `silent` | never listens |
//! | `exit STATUS` | ends at once |
//! | `spam LINES` | writes that many lines to each of its streams, then is `http` |
//!
//! | option | does |
//! | --- | --- |
//! | `--gate FILE` | listens only once FILE exists |
//! | `--status FILE` | the answer to `/health` is the status in FILE; 200 while there is none |
//! | `--heads FILE` | appends the head of each request to FILE |
//! | `--proxy VERSION` | `http` wants each connection to begin with a PROXY header, `v1` or `v2`, and resets others; `/proxy` is answered with it |
//! | `--headers FILE` | appends each PROXY header to FILE |
//! | `--ignore-term` | SIGTERM does nothing |
//! | `--finish FILE` | on SIGTERM it ends, with status 0, when no request is being answered, and makes FILE |
//! | `--fork` | has a child in a session of its own, which outlives it |
//! | `--daemonize` | has a grandchild that has left it in every way, and ignores SIGTERM |
//! | `--spoil FILE` | does what FILE says to the socket that is descriptor 3, as soon as there is one, and removes it: `shutdown`, `dissolve` or `lock` it and end, `detach` the program of its group, or `steal` all connections |
//! | `--pour BYTES` | has a thread that writes so many bytes to standard output, no newline among them |
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its fixture does")]

use std::{
    env,
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
    process::{self, Command},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    libc, setsockopt_impl, sockopt_impl,
    sys::{
        signal::{SigSet, Signal},
        socket::{setsockopt, sockopt::AttachReusePortCbpf},
        stat::{Mode, umask},
    },
    unistd::{getsid, setsid},
};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};

/// Between two looks at a file that somebody is to make.
const LOOK: Duration = Duration::from_millis(5);

fn main() {
    LazyLock::force(&DESCRIPTORS);
    let words: Vec<String> = env::args().skip(1).collect();
    let option = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        Some(words.get(at + 1).cloned().unwrap_or_default())
    };
    if option("--ignore-term").is_some() {
        // Blocked before there is another thread, so in all of them.
        SigSet::from(Signal::SIGTERM).thread_block().unwrap();
    }
    if let Some(file) = option("--finish") {
        // Blocked before there is another thread, likewise.
        SigSet::from(Signal::SIGTERM).thread_block().unwrap();
        thread::spawn(move || finish(&file));
    }
    if option("--fork").is_some() {
        let mut child =
            Command::new(env::current_exe().unwrap()).arg("daemonized").spawn().unwrap();
        thread::spawn(move || child.wait());
    }
    if option("--daemonize").is_some() {
        // Gone before this goes on, so that what it leaves is nobody's child.
        Command::new(env::current_exe().unwrap()).arg("daemonize").status().unwrap();
    }
    if let Some(bytes) = option("--pour") {
        let bytes = bytes.parse().unwrap();
        thread::spawn(move || pour(io::stdout(), bytes));
    }
    if let Some(file) = option("--spoil") {
        thread::spawn(move || spoil(&file));
    }
    if let Some(gate) = option("--gate") {
        while !Path::new(&gate).exists() {
            thread::sleep(LOOK);
        }
    }
    let argument = words.get(1).map_or("", String::as_str);
    match words[0].as_str() {
        "http" => http(Http {
            status: option("--status").unwrap_or_default(),
            heads: option("--heads"),
            proxy: option("--proxy"),
            headers: option("--headers"),
        }),
        "echo" => serve(|stream| echo(&stream)),
        "tell" => {
            let (version, headers) = (argument.to_owned(), option("--headers"));
            serve(move |stream| {
                if let Some(header) = proxied(&stream, &version, headers.as_deref()) {
                    (&stream).write_all(format!("{header}\n").as_bytes()).unwrap();
                    echo(&stream);
                }
            });
        }
        "reset" => serve(|stream| reset(&stream)),
        "pour" => {
            let bytes = argument.parse().unwrap();
            serve(move |stream| {
                if (&stream).read(&mut [0; 4096]).is_ok_and(|read| read > 0) {
                    pour(&stream, bytes);
                    reset_now(&stream);
                }
            });
        }
        "closing" => {
            drop(accept_until(argument, 128));
            done(argument);
            for_ever();
        }
        "hear" => {
            let file = argument.to_owned();
            serve(move |stream| hear(&stream, &file));
        }
        "deaf" => serve(|_open| for_ever()),
        "stalling" => stalling(argument),
        "slow" => slow(argument.parse().unwrap(), words[2].parse().unwrap()),
        "forget" => serve(|stream| _ = (&stream).read(&mut [0; 4096])),
        "silent" => for_ever(),
        "exit" => process::exit(argument.parse().unwrap()),
        "spam" => {
            for number in 0..argument.parse::<u64>().unwrap() {
                println!("line {number}");
                eprintln!("line {number}");
            }
            http(Http::default());
        }
        "daemonized" => {
            setsid().unwrap();
            for_ever();
        }
        "daemonize" => {
            setsid().unwrap();
            let mut orphan = Command::new(env::current_exe().unwrap());
            orphan.args(["silent", "--ignore-term"]);
            #[expect(clippy::zombie_processes, reason = "it shall outlive this process")]
            orphan.spawn().unwrap();
        }
        mode => panic!("no mode {mode}"),
    }
}

/// What a hostile worker can do to the socket that it was given.
fn spoil(file: &str) -> ! {
    // SAFETY: with this option there is such a socket, and nobody closes it.
    let fd = unsafe { BorrowedFd::borrow_raw(3) };
    let socket = SockRef::from(&fd);
    loop {
        let word = fs::read_to_string(file).unwrap_or_default();
        if word.is_empty() || fs::remove_file(file).is_err() {
            thread::sleep(LOOK);
            continue;
        }
        match word.as_str() {
            "shutdown" => socket.shutdown(Shutdown::Both).unwrap(),
            "dissolve" => {
                let unspecified = [0_u8; 16]; // AF_UNSPEC is 0
                // SAFETY: the kernel reads 16 bytes, as many as there are.
                let result = unsafe { libc::connect(3, unspecified.as_ptr().cast(), 16) };
                assert_eq!(result, 0);
            }
            "lock" => {
                let drop_all = [SockFilter::new(libc::BPF_RET as u16, 0, 0, 0)];
                socket.attach_filter(&drop_all).unwrap();
                setsockopt(&fd, LockFilter, &true).unwrap();
            }
            "detach" => {
                // An error says that there is none: it has not been put on again yet.
                _ = setsockopt(&fd, DetachReusePortBpf, &0);
                continue;
            }
            "steal" => {
                // The kernel's list: lbd's two sockets, then those of the workers as they came.
                let code = (libc::BPF_RET | libc::BPF_K) as u16;
                let mut program = [libc::sock_filter { code, jt: 0, jf: 0, k: 2 }];
                let program = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
                setsockopt(&fd, AttachReusePortCbpf, &program).unwrap();
                continue;
            }
            word => panic!("no such thing as {word}"),
        }
        process::exit(1);
    }
}

sockopt_impl!(
    /// `SO_LOCK_FILTER` (socket(7)).
    LockFilter,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_LOCK_FILTER,
    bool
);

sockopt_impl!(
    /// `SO_DETACH_REUSEPORT_BPF` (socket(7)).
    DetachReusePortBpf,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_DETACH_REUSEPORT_BPF,
    i32
);

fn listener() -> Socket {
    if env::var_os("LISTEN_FDS").is_some() {
        // SAFETY: whoever sets LISTEN_FDS passes a listening socket as descriptor 3
        // (sd_listen_fds(3)), and this is the one place that takes it.
        return unsafe { OwnedFd::from_raw_fd(3) }.into();
    }
    let port: u16 = env::var("PORT").unwrap().parse().unwrap();
    OwnedFd::from(TcpListener::bind(("127.0.0.1", port)).unwrap()).into()
}

/// A thread for each connection. With a unix one nothing is done but what all streams have in common.
fn serve(handle: impl Fn(TcpStream) + Clone + Send + 'static) {
    let listener = listener();
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Too many at once: some of them will end.
            thread::sleep(LOOK);
            continue;
        };
        let (handle, stream) = (handle.clone(), TcpStream::from(stream));
        thread::spawn(move || handle(stream));
    }
}

/// What `http` does besides.
#[derive(Debug, Clone, Default)]
struct Http {
    status: String,
    heads: Option<String>,
    proxy: Option<String>,
    headers: Option<String>,
}

fn http(options: Http) {
    serve(move |stream| {
        let header = match &options.proxy {
            Some(version) => match proxied(&stream, version, options.headers.as_deref()) {
                Some(header) => header,
                None => return,
            },
            None => String::new(),
        };
        // A client that leaves in the middle is none of its business.
        let _ = requests(&stream, &header, &options);
    });
}

/// The PROXY header in front of everything, in words; without one, the connection is reset.
fn proxied(stream: &TcpStream, version: &str, file: Option<&str>) -> Option<String> {
    let header = match version {
        "v1" => line(stream),
        "v2" => binary(stream),
        version => panic!("no version {version}"),
    };
    let Ok(header) = header else {
        reset_now(stream);
        return None;
    };
    if let Some(file) = file {
        let mut file = OpenOptions::new().append(true).create(true).open(file).unwrap();
        writeln!(file, "{header}").unwrap();
    }
    Some(header)
}

/// Not a byte more than the line.
fn line(mut stream: &TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
        if line.len() > 107 || !b"PROXY ".starts_with(&line[..line.len().min(6)]) {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// Put into the words of a line, but for `LOCAL`.
fn binary(mut stream: &TcpStream) -> io::Result<String> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let (signature, rest) = head.split_at(12);
    if signature != b"\r\n\r\n\0\r\nQUIT\n" {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut ends = vec![0; u16::from_be_bytes([rest[2], rest[3]]).into()];
    stream.read_exact(&mut ends)?;
    let port = |at: usize| u16::from_be_bytes([ends[at], ends[at + 1]]);
    Ok(match (rest[0], rest[1], ends.len()) {
        (0x20, 0x00, 0) => "LOCAL".to_owned(),
        (0x21, 0x11, 12) => {
            let ip = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&ends[at..at + 4]).unwrap());
            format!("PROXY TCP4 {} {} {} {}", ip(0), ip(4), port(8), port(10))
        }
        (0x21, 0x21, 36) => {
            let ip = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&ends[at..at + 16]).unwrap());
            format!("PROXY TCP6 {} {} {} {}", ip(0), ip(16), port(32), port(34))
        }
        _ => return Err(io::ErrorKind::InvalidData.into()),
    })
}

fn requests(stream: &TcpStream, header: &str, options: &Http) -> io::Result<()> {
    // There is no such thing on unix.
    _ = stream.set_nodelay(true);
    let mut reader = BufReader::new(stream);
    loop {
        let (mut head, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            head.push_str(&line);
        }
        if let Some(file) = &options.heads {
            let mut file = OpenOptions::new().append(true).create(true).open(file)?;
            file.write_all(head.as_bytes())?;
        }
        let path = head.split(' ').nth(1).unwrap_or("/");
        ANSWERING.fetch_add(1, Ordering::SeqCst);
        let (code, body) = match path {
            "/proxy" => (200, header.as_bytes().to_vec()),
            path => page(path, &head, &options.status),
        };
        let keep = !head.to_ascii_lowercase().contains("connection: close");
        let connection = if keep { "keep-alive" } else { "close" };
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {code} -\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n"
        );
        let written = (&mut &*stream).write_all(&[answer.as_bytes(), &body].concat());
        ANSWERING.fetch_sub(1, Ordering::SeqCst);
        written?;
        if !keep {
            return Ok(());
        }
    }
}

/// How many requests are being answered.
static ANSWERING: AtomicUsize = AtomicUsize::new(0);

/// What a server does that finishes its requests.
fn finish(file: &str) {
    SigSet::from(Signal::SIGTERM).wait().unwrap();
    while ANSWERING.load(Ordering::SeqCst) > 0 {
        thread::sleep(LOOK);
    }
    fs::write(file, "").unwrap();
    process::exit(0);
}

/// What a GET of `path` is answered with.
fn page(path: &str, head: &str, status: &str) -> (u16, Vec<u8>) {
    let lines = |words: Vec<String>| words.join("\n").into_bytes();
    let body = match path.split('/').collect::<Vec<_>>().as_slice() {
        // Who answers.
        ["", ""] => {
            let me = env::var("PORT").or_else(|_| env::var("LBD_SLOT")).unwrap();
            format!("{me} {}", process::id()).into_bytes()
        }
        ["", "health"] => {
            let status = fs::read_to_string(status).ok().and_then(|text| text.trim().parse().ok());
            return (status.unwrap_or(200), Vec::new());
        }
        // Answers when that file exists; that it is at it, FILE.asked says, where it may write.
        ["", "when", file @ ..] => {
            let file = format!("/{}", file.join("/"));
            _ = fs::write(format!("{file}.asked"), "");
            while !Path::new(&file).exists() {
                thread::sleep(LOOK);
            }
            Vec::new()
        }
        ["", "bytes", count] => vec![b'x'; count.parse().unwrap()],
        // What it was given.
        ["", "head"] => head.as_bytes().to_vec(),
        ["", "argv"] => lines(env::args().skip(1).collect()),
        ["", "env"] => lines(env::vars().map(|(name, value)| format!("{name}={value}")).collect()),
        ["", "directory"] => env::current_dir().unwrap().into_os_string().into_encoded_bytes(),
        ["", "umask"] => {
            let mask = umask(Mode::empty());
            umask(mask);
            format!("{:03o}", mask.bits()).into_bytes()
        }
        ["", "session"] => getsid(None).unwrap().to_string().into_bytes(),
        ["", "descriptors"] => lines(DESCRIPTORS.clone()),
        _ => return (404, Vec::new()),
    };
    (200, body)
}

/// `NUMBER TARGET` of each descriptor that it was started with.
static DESCRIPTORS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let name = |number: u32| {
        let target = fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
        Some(format!("{number} {}", target.display()))
    };
    (0..1024).filter_map(name).collect()
});

fn echo(stream: &TcpStream) {
    let _ = io::copy(&mut &*stream, &mut &*stream);
    let _ = stream.shutdown(Shutdown::Write);
}

fn reset(mut stream: &TcpStream) {
    let _ = stream.read(&mut [0; 4096]);
    reset_now(stream);
}

/// To close it now is to reset it (socket(7), SO_LINGER).
fn reset_now(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Anything but newlines, and nothing that is text.
fn pour(mut to: impl Write, mut bytes: usize) {
    let block: Vec<u8> = (0..=255).cycle().filter(|byte| *byte != b'\n').take(1 << 16).collect();
    while bytes > 0 {
        // Through whatever buffer, to whoever does not listen any more: only the amount counts.
        let _ = to.write_all(&block[..bytes.min(block.len())]).and_then(|()| to.flush());
        bytes = bytes.saturating_sub(block.len());
    }
}

/// Probes, which say nothing, are not written down.
fn hear(mut stream: &TcpStream, file: &str) {
    let mut heard = vec![0; 1];
    if stream.read_exact(&mut heard).is_err() {
        return;
    }
    stream.write_all(b"bye").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let heard = match stream.read_to_end(&mut heard) {
        Ok(_) => heard,
        Err(error) => format!("{:?}", error.kind()).into_bytes(),
    };
    let whole = format!("{file}.part");
    fs::write(&whole, heard).unwrap();
    fs::rename(whole, file).unwrap();
}

fn stalling(file: &str) {
    let socket = accept_until(file, 0);
    // A queue of zero holds one (listen(2) and `sk_acceptq_is_full` in the kernel's sock.h).
    let _waiting = TcpStream::connect(socket.local_addr().unwrap().as_socket().unwrap()).unwrap();
    done(file);
    for_ever();
}

/// Listens on `$PORT` with such a queue, and accepts whoever comes until there is such a file.
fn accept_until(file: &str, backlog: i32) -> Socket {
    let port: u16 = env::var("PORT").unwrap().parse().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(backlog).unwrap();
    socket.set_nonblocking(true).unwrap();
    while !Path::new(file).exists() {
        if socket.accept().is_err() {
            thread::sleep(LOOK);
        }
    }
    socket
}

fn done(file: &str) {
    fs::write(format!("{file}.done"), "").unwrap();
}

fn slow(millis: u64, backlog: i32) {
    let listener = listener();
    listener.listen(backlog).unwrap();
    loop {
        let (stream, _) = listener.accept().unwrap();
        let stream = TcpStream::from(stream);
        let mut head = [0; 4096];
        // Who says nothing asks for nothing: a probe.
        if (&stream).read(&mut head).is_ok_and(|read| read > 0) {
            thread::sleep(Duration::from_millis(millis));
            let answer = "HTTP/1.1 200 -\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
            _ = (&stream).write_all(answer.as_bytes());
        }
    }
}

fn for_ever() {
    loop {
        thread::park();
    }
}
