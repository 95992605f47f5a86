//! Parses single values. An error says what is wrong and what would be right.

use std::{
    fs,
    io::ErrorKind,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use bytesize::ByteSize;
use nix::sys::signal::Signal;

use super::{Listen, Network, Output, StatusSet};

/// A larger number of workers is probably a typo.
pub(super) const MAX_WORKERS: u32 = 1024;

/// `sun_path` has 108 bytes, one of them for the closing NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Ten years: longer than any useful value, and far from overflowing an `Instant`.
const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// `text` for an error message: on one line, shortened, without anything that a terminal obeys.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The word in `words` that `text` is probably a misspelling of.
pub(super) fn suggestion<'w>(text: &str, words: &[&'w str]) -> Option<&'w str> {
    if text.len() > 64 {
        return None;
    }
    let text = text.to_lowercase().replace('_', "-");
    let distance = |word: &&str| strsim::osa_distance(&text, word);
    let closest = words.iter().copied().min_by_key(distance)?;
    let allowed = if text.chars().count() > 4 { 2 } else { 1 };
    (distance(&closest) <= allowed).then_some(closest)
}

pub(super) fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*value);
    }
    let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    Err(unknown_word(text, &names))
}

/// `listen`: `127.0.0.1:80`, `[::1]:80`, or `unix:` and a path, relative to `base`.
pub(super) fn listen(text: &str, base: &Path) -> Result<Listen, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return listen_path(path, base).map(Listen::Unix);
    }
    let address: SocketAddr = text.parse().map_err(|_| not_an_address(text))?;
    ip_itself(address.ip())?;
    if address.port() == 0 {
        return Err(format!("{address} has port 0; expected a port from 1 to 65535"));
    }
    Ok(Listen::Tcp(address))
}

/// Parses the path of a unix socket that clients connect to. Refuses options before or after the
/// path, as other programs have them: they would silently become part of the file name.
pub(super) fn listen_path(text: &str, base: &Path) -> Result<PathBuf, String> {
    if let Some(name) = text.strip_prefix('@') {
        let path = quoted(&format!("unix:/run/{name}.sock"));
        return Err(format!(
            "{} would be an abstract socket, to which everybody on the machine may connect; write a \
             path such as {path}",
            quoted(text)
        ));
    }
    if let Some((path, options)) = with_options(text) {
        let mode = options
            .split(|c: char| !c.is_ascii_alphanumeric())
            .rfind(|word| word.len() >= 3 && word.bytes().all(|byte| matches!(byte, b'0'..=b'7')));
        let mode = quoted(mode.unwrap_or("660"));
        return Err(format!(
            "{} has options in it; write a table: {{ unix = {}, mode = {mode} }}",
            quoted(text),
            quoted(path),
        ));
    }
    socket_path(text, base)
}

/// Splits a path from options after it, as written for socat (`,mode=660`), puma (`?umask=0111`),
/// Caddy (`|0222`) and HAProxy (` mode 660`).
fn with_options(text: &str) -> Option<(&str, &str)> {
    let is_option = |text: &str| {
        let name = text.bytes().take_while(u8::is_ascii_alphabetic).count();
        name > 0 && text[name..].starts_with('=')
    };
    let words = ["mode", "user", "uid", "owner", "group", "gid", "perm", "umask"];
    let is_word = |text: &str| text.split_once(' ').is_some_and(|(word, _)| words.contains(&word));
    let is_mode = |text: &str| text.len() >= 3 && text.bytes().all(|b| b.is_ascii_digit());
    text.match_indices([',', '?', '|', ' ']).find_map(|(at, separator)| {
        let (path, options) = (&text[..at], &text[at + 1..]);
        let found = match separator {
            " " => is_word(options),
            "|" => is_mode(options),
            _ => is_option(options),
        };
        found.then_some((path, options))
    })
}

/// `mode` of a unix socket: octal digits.
pub(super) fn socket_mode(text: &str) -> Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| digits && mode <= 0o777);
    match mode {
        Some(mode) if mode & 0o222 == 0 => Err(format!(
            "with {} nobody could connect, which takes the right to write; expected octal digits \
             such as \"660\"",
            quoted(text)
        )),
        Some(mode) => Ok(mode),
        None => {
            Err(format!("{} is not a mode; expected octal digits such as \"660\"", quoted(text)))
        }
    }
}

/// `[admin] listen`: TCP addresses only.
pub(super) fn tcp_listen(text: &str) -> Result<SocketAddr, String> {
    match listen(text, Path::new(""))? {
        Listen::Tcp(address) => Ok(address),
        Listen::Unix(path) => {
            let path = quoted(&path.to_string_lossy());
            Err(format!("a unix socket; write socket = {path}, or an address"))
        }
    }
}

/// The path of a unix socket, relative to `base`.
pub(super) fn socket_path(text: &str, base: &Path) -> Result<PathBuf, String> {
    let path = path_in(base, text)?;
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        let path = path.display();
        return Err(format!(
            "{path} has {length} bytes; a unix socket's path has at most {MAX_SOCKET_PATH}"
        ));
    }
    Ok(path)
}

/// `host`.
pub(super) fn ip(text: &str) -> Result<IpAddr, String> {
    let ip = text.parse().map_err(|_| {
        format!("{} is not an IP address; expected one such as \"127.0.0.1\"", quoted(text))
    })?;
    ip_itself(ip)?;
    Ok(ip)
}

/// A network of `accept-proxy-protocol`: `10.0.0.0/8`, or a single address.
pub(super) fn network(text: &str) -> Result<Network, String> {
    let not_one = || {
        format!(
            "{} is not a network; expected one such as \"10.0.0.0/8\" or \"2001:db8::1\", or \"unix\" \
             for the clients of unix sockets",
            quoted(text)
        )
    };
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| not_one())?;
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(format!(
            "{v6} is an IPv4 address; write {v4} with the prefix of an IPv4 network"
        ));
    }
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => most,
        Some(prefix) if prefix.bytes().all(|b| b.is_ascii_digit()) => {
            prefix.parse().ok().filter(|prefix| *prefix <= most).ok_or_else(|| {
                format!("{} has a prefix that is not from 0 to {most}", quoted(text))
            })?
        }
        Some(_) => return Err(not_one()),
    };
    Network::new(address, prefix).ok_or_else(|| {
        let network = Network::around(address, prefix);
        format!("{} has bits behind its prefix; write \"{network}\"", quoted(text))
    })
}

/// `keepalive`: a value that TCP accepts (tcp(7), `TCP_KEEPIDLE`).
pub(super) fn keepalive(text: &str) -> Result<Duration, String> {
    const MOST: Duration = Duration::from_secs(32767);
    match duration(text)? {
        wait if wait.subsec_nanos() == 0 && (Duration::from_secs(1)..=MOST).contains(&wait) => {
            Ok(wait)
        }
        _ => Err(format!("{} is not a whole number of seconds from 1 to 32767", quoted(text))),
    }
}

/// `workers`.
pub(super) fn workers(count: u32) -> Result<NonZeroU32, String> {
    NonZeroU32::new(count)
        .filter(|count| count.get() <= MAX_WORKERS)
        .ok_or_else(|| format!("expected a number from 1 to {MAX_WORKERS}, found {count}"))
}

/// The first word of argv: the program.
pub(super) fn program(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("the program is empty; write its name or path".to_owned());
    }
    argument(text)
}

/// Another word of argv, which may be empty.
pub(super) fn argument(text: &str) -> Result<String, String> {
    no_nul(text)?;
    Ok(text.to_owned())
}

/// A name or number of a user or group.
pub(super) fn account(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("empty; expected a name or a number".to_owned());
    }
    no_nul(text)?;
    // Checked also if a user has this name: no system has such names, and getpwnam(3) may find a
    // number for it.
    if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.parse().is_ok_and(is_id) {
        let text = quoted(text);
        return Err(format!("{text} is no user or group; expected one from 0 to {MAX_ID}"));
    }
    Ok(text.to_owned())
}

/// The largest user or group number. setresuid(2) takes the next one, -1, as "leave unchanged".
pub(super) const MAX_ID: u32 = u32::MAX - 1;

fn is_id(number: u32) -> bool {
    number <= MAX_ID
}

/// `umask`: octal digits.
pub(super) fn umask(text: &str) -> Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    let mask = u32::from_str_radix(text, 8).ok().filter(|&mask| digits && mask <= 0o777);
    mask.ok_or_else(|| {
        format!("{} is not a umask; expected octal digits such as \"027\"", quoted(text))
    })
}

/// `output`: a keyword, or a path relative to `base`.
pub(super) fn output(text: &str, base: &Path) -> Result<Output, String> {
    match text {
        "log" => Ok(Output::Log),
        "inherit" => Ok(Output::Inherit),
        "null" => Ok(Output::Null),
        // A misspelt keyword must not become a file of that name.
        _ if !text.contains(['/', '.']) => {
            Err(unknown_word(text, &["log", "inherit", "null", "./a/path"]))
        }
        _ if text.contains("{port}") => Err(format!(
            "{} has {{port}} in it, which may differ from start to start; write {{slot}}",
            quoted(text)
        )),
        _ => Ok(Output::File(path_in(base, text)?)),
    }
}

/// A duration such as `1m 30s`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("{} has no unit; write \"{text}s\" for seconds", quoted(text)));
    }
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= MAX_DURATION => Ok(duration),
        Ok(_) => Err(format!("{} is longer than ten years", quoted(text))),
        Err(_) => Err(format!(
            "{} is not a duration; expected one such as \"250ms\" or \"1m 30s\"",
            quoted(text)
        )),
    }
}

/// Like [`duration`], but not zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be longer than zero".to_owned()),
        duration => Ok(duration),
    }
}

/// A size such as `512MiB`, in bytes.
pub(super) fn size(text: &str) -> Result<NonZeroU64, String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("{} has no unit; write \"{text}MiB\" for mebibytes", quoted(text)));
    }
    match text.parse::<ByteSize>().map(|size| NonZeroU64::new(size.as_u64())) {
        Ok(Some(size)) => Ok(size),
        Ok(None) => Err("must be more than zero".to_owned()),
        Err(_) => Err(format!(
            "{} is not a size; expected one such as \"512MiB\" or \"1.5GiB\"",
            quoted(text)
        )),
    }
}

/// A number per second, such as `100/s`.
pub(super) fn rate(text: &str) -> Result<NonZeroU32, String> {
    let number = text
        .strip_suffix("/s")
        .filter(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    match number.map(str::parse::<u32>) {
        Some(Ok(number)) => NonZeroU32::new(number).ok_or("must be more than zero".to_owned()),
        Some(Err(_)) | None => {
            Err(format!("{} is not a rate; expected one such as \"1000/s\"", quoted(text)))
        }
    }
}

/// `signal`, with or without `SIG`.
pub(super) fn signal(text: &str) -> Result<Signal, String> {
    let signal = Signal::from_str(text).or_else(|_| Signal::from_str(&format!("SIG{text}")));
    match signal {
        Ok(Signal::SIGSTOP) => {
            Err("STOP would freeze the worker; expected \"TERM\" or another that ends it"
                .to_owned())
        }
        Ok(signal) => Ok(signal),
        Err(_) => Err(format!(
            "{} is not a signal; expected one such as \"TERM\" or \"QUIT\"",
            quoted(text)
        )),
    }
}

/// `expect`: `200-299, 304`.
pub(super) fn statuses(text: &str) -> Result<StatusSet, String> {
    let ranges: Option<Vec<_>> = text.split(',').map(|part| status_range(part.trim())).collect();
    ranges.map(StatusSet).ok_or_else(|| {
        format!(
            "{} is not a set of statuses; expected some of 100 to 599, such as \"200-299, 304\"",
            quoted(text)
        )
    })
}

/// The target of a probe's GET.
pub(super) fn request_target(text: &str) -> Result<String, String> {
    if text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{} is not a request's path; expected one such as \"/healthz\", with %20 for a space",
        quoted(text)
    ))
}

/// The Host header of a probe.
pub(super) fn host_header(text: &str) -> Result<String, String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(text.to_owned());
    }
    Err(format!("{} is not a Host header; expected one such as \"example.org\"", quoted(text)))
}

/// A path, relative to `base`, without `.` and doubled slashes, so that equal paths look equal.
pub(super) fn path_in(base: &Path, text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("the path is empty; write one, or remove it".to_owned());
    }
    // The kernel refuses only NUL, but a line break in a path would break a line of the log.
    if text.contains(char::is_control) {
        return Err(format!("{} has a control character in it; write a plain path", quoted(text)));
    }
    Ok(base.join(text).components().collect())
}

/// Like [`path_in`], but the path must be an existing folder.
pub(super) fn folder_in(base: &Path, text: &str) -> Result<PathBuf, String> {
    let path = path_in(base, text)?;
    let shown = path.display();
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(format!("{shown} is not a folder; expected one")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(format!("{shown} does not exist; expected a folder"))
        }
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

pub(super) fn no_nul(text: &str) -> Result<(), String> {
    if text.contains('\0') {
        return Err(format!("{} has a NUL character in it; remove it", quoted(text)));
    }
    Ok(())
}

fn unknown_word(text: &str, words: &[&str]) -> String {
    let shown = quoted(text);
    if let Some(word) = suggestion(text, words) {
        return format!("{shown} is not known here; did you mean \"{word}\"?");
    }
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    format!("{shown} is not known here; expected {}", words.join(" or "))
}

/// Refuses an IPv4-mapped IPv6 address: a socket with IPV6_V6ONLY can't be bound to one.
fn ip_itself(ip: IpAddr) -> Result<(), String> {
    match ip {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => Err(format!("{v6} is an IPv4 address; write {v4}")),
            None => Ok(()),
        },
        IpAddr::V4(_) => Ok(()),
    }
}

fn not_an_address(text: &str) -> String {
    let shown = quoted(text);
    if let Ok(ip) = text.parse::<IpAddr>() {
        return format!("{shown} has no port; write \"{}\"", SocketAddr::new(ip, 8080));
    }
    if let Ok(v6) = text.trim_matches(['[', ']']).parse::<Ipv6Addr>() {
        return format!("{shown} has no port; write \"[{v6}]:8080\"");
    }
    let path = text.strip_prefix("unix@").unwrap_or(text);
    if path.starts_with(['/', '.']) {
        let socket = quoted(&format!("unix:{path}"));
        return format!("{shown} is a path; write {socket} for a unix socket");
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let Ok(port) = port.parse::<u16>() else {
        return format!(
            "{shown} is not an address; expected an IP address and a port up to 65535, such as \"127.0.0.1:8080\""
        );
    };
    match host {
        "" | "*" => format!(
            "{shown} has no address; write \"127.0.0.1:{port}\", or \"0.0.0.0:{port}\" for every interface"
        ),
        "localhost" => format!("{shown} has a name in it; write \"127.0.0.1:{port}\""),
        _ => format!(
            "{shown} has no IP address; names are not looked up: write one such as \"127.0.0.1:{port}\""
        ),
    }
}

fn status_range(text: &str) -> Option<(u16, u16)> {
    let status = |text: &str| {
        let digits = text.len() == 3 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|status| digits && (100..=599).contains(status))
    };
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (status(low.trim())?, status(high.trim())?);
    (low <= high).then_some((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> &'static Path {
        Path::new("/srv")
    }

    #[test]
    fn an_address_that_is_refused_says_what_to_write() {
        let mapped = "::ffff:127.0.0.1 is an IPv4 address; write 127.0.0.1";
        let no_address =
            r#"has no address; write "127.0.0.1:80", or "0.0.0.0:80" for every interface"#;
        let not_one = "is not an address; expected an IP address and a port up to 65535, such as \
                       \"127.0.0.1:8080\"";
        for (text, message) in [
            ("127.0.0.1", r#""127.0.0.1" has no port; write "127.0.0.1:8080""#),
            ("::1", r#""::1" has no port; write "[::1]:8080""#),
            ("[::1]", r#""[::1]" has no port; write "[::1]:8080""#),
            ("80", &format!("\"80\" {no_address}")),
            (":80", &format!("\":80\" {no_address}")),
            ("*:80", &format!("\"*:80\" {no_address}")),
            ("localhost:80", r#""localhost:80" has a name in it; write "127.0.0.1:80""#),
            (
                "a.org:80",
                r#""a.org:80" has no IP address; names are not looked up: write one such as "127.0.0.1:80""#,
            ),
            ("/run/x", r#""/run/x" is a path; write "unix:/run/x" for a unix socket"#),
            ("./x", r#""./x" is a path; write "unix:./x" for a unix socket"#),
            ("127.0.0.1:0", "127.0.0.1:0 has port 0; expected a port from 1 to 65535"),
            ("127.0.0.1:65536", &format!("\"127.0.0.1:65536\" {not_one}")),
            ("", &format!("\"\" {not_one}")),
            ("[::ffff:127.0.0.1]:80", mapped),
            ("unix:", "the path is empty; write one, or remove it"),
            (
                "unix:@lbd",
                "\"@lbd\" would be an abstract socket, to which everybody on the machine may connect; \
                 write a path such as \"unix:/run/lbd.sock\"",
            ),
            (
                "unix:/run/x,mode=660,user=www",
                "\"/run/x,mode=660,user=www\" has options in it; write a table: \
                 { unix = \"/run/x\", mode = \"660\" }",
            ),
            (
                "unix:/run/x?umask=0111&mode=0640",
                "\"/run/x?umask=0111&mode=0640\" has options in it; write a table: \
                 { unix = \"/run/x\", mode = \"0640\" }",
            ),
            (
                "unix:x|0222",
                "\"x|0222\" has options in it; write a table: { unix = \"x\", mode = \"0222\" }",
            ),
            (
                "unix:/x mode 600 user www",
                "\"/x mode 600 user www\" has options in it; write a table: \
                 { unix = \"/x\", mode = \"600\" }",
            ),
            (
                "unix:/x,user=www",
                "\"/x,user=www\" has options in it; write a table: { unix = \"/x\", mode = \"660\" }",
            ),
            ("unix@/x", "\"unix@/x\" is a path; write \"unix:/x\" for a unix socket"),
        ] {
            assert_eq!(listen(text, base()), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_name_that_only_looks_like_options_is_a_name() {
        for text in ["a,b", "a|b", "a?b", "my mode", "x,=1", "a b=c", "é,ü=1"] {
            let path = base().join(text);
            assert_eq!(listen(&format!("unix:{text}"), base()), Ok(Listen::Unix(path)), "{text}");
        }
    }

    #[test]
    fn a_mode_lets_somebody_connect() {
        assert_eq!(socket_mode("660"), Ok(0o660));
        assert_eq!(socket_mode("0222"), Ok(0o222));
        for text in ["", "8", "1777", "444", "000", "-1", "rw", "0o660", "99999999999999999"] {
            assert!(socket_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_unix_path_has_107_bytes_at_most() {
        let text = format!("unix:/{}", "x".repeat(106));
        assert_eq!(listen(&text, base()), Ok(Listen::Unix(PathBuf::from(&text[5..]))));
        // The folder counts too: it is the whole path that the kernel gets.
        let text = format!("unix:{}", "x".repeat(103));
        let path = format!("/srv/{}", &text[5..]);
        let message = format!("{path} has 108 bytes; a unix socket's path has at most 107");
        assert_eq!(listen(&text, base()), Err(message));
    }

    #[test]
    fn a_duration_never_overflows_an_instant() {
        assert_eq!(duration("3650days"), Ok(MAX_DURATION));
        assert!(std::time::Instant::now().checked_add(MAX_DURATION).is_some());
        assert_eq!(
            duration("3650days 1ns").unwrap_err(),
            "\"3650days 1ns\" is longer than ten years"
        );
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn statuses_are_what_a_server_may_send() {
        assert_eq!(statuses("100-599,204"), Ok(StatusSet(vec![(100, 599), (204, 204)])));
        for text in
            ["", "99", "600", "20", "200-", "-200", "200,", "2xx", "+200", "300-200", "200-299-"]
        {
            assert!(statuses(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_suggestion_is_close() {
        let words = ["listen", "log", "connect-timeout"];
        for (text, expected) in [
            ("lisetn", Some("listen")),
            ("Listen", Some("listen")),
            ("lgo", Some("log")),
            ("connect_timeout", Some("connect-timeout")),
            ("conect-timout", Some("connect-timeout")),
            ("dog", Some("log")),
            ("abc", None),
            ("", None),
        ] {
            assert_eq!(suggestion(text, &words), expected, "{text}");
        }
        assert_eq!(suggestion(&"l".repeat(1 << 20), &words), None);
    }

    #[test]
    fn what_is_quoted_is_one_short_line() {
        assert_eq!(quoted("a\n\u{1b}[2J"), r#""a\n\u{1b}[2J""#);
        assert_eq!(quoted(&"é".repeat(61)), format!("{:?}…", "é".repeat(60)));
    }
}
