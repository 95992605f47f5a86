//! A bare HTTP/1.1 client: what is sent is written out in the test, what comes back is whole.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
};

use super::PATIENCE;

/// One connection.
pub(crate) struct Client(BufReader<TcpStream>);

/// One answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The value of the header `name`, which must not occur twice.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "two {name} in {self:?}");
        value
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// `GET path` with further header lines, each ended by `\r\n`.
    pub(crate) fn get_with(&mut self, path: &str, headers: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n"));
        self.answer()
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.get_with(path, "")
    }

    pub(crate) fn head(&mut self, path: &str) -> Answer {
        self.send(format!("HEAD {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
        self.head_of_answer()
    }

    /// The next answer, with the body that its `Content-Length` promises.
    pub(crate) fn answer(&mut self) -> Answer {
        let mut answer = self.head_of_answer();
        let length = answer.header("content-length").map_or(0, |value| value.parse().unwrap());
        answer.body.resize(length, 0);
        self.0.read_exact(&mut answer.body).unwrap();
        answer
    }

    /// The next answer's status and headers; the body is not read.
    pub(crate) fn head_of_answer(&mut self) -> Answer {
        let status = self.line();
        let (version, status) = status.split_at_checked(9).unwrap_or_else(|| panic!("{status:?}"));
        assert!(matches!(version, "HTTP/1.1 " | "HTTP/1.0 "), "{version:?}");
        let mut answer =
            Answer { status: status[..3].parse().unwrap(), headers: Vec::new(), body: Vec::new() };
        loop {
            let line = self.line();
            if line.is_empty() {
                return answer;
            }
            let (name, value) = line.split_once(':').unwrap();
            answer.headers.push((name.to_owned(), value.trim_ascii().to_owned()));
        }
    }

    /// Reads to the end of the connection, and says how many bytes came.
    pub(crate) fn drain(&mut self) -> u64 {
        std::io::copy(&mut self.0, &mut std::io::sink()).unwrap()
    }

    /// Exactly `length` bytes, which are dropped.
    pub(crate) fn skip(&mut self, length: u64) {
        let read = std::io::copy(&mut (&mut self.0).take(length), &mut std::io::sink()).unwrap();
        assert_eq!(read, length, "the connection ended early");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.strip_suffix("\r\n").unwrap_or_else(|| panic!("cut short: {line:?}")).to_owned()
    }
}
