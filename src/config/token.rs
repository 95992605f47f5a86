//! The secret that admin requests over TCP must carry, and the file that it is stored in.

use std::{
    fmt,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::Path,
};

use subtle::ConstantTimeEq;

use super::file::{self, FileError};

/// A longer file can't be a token file.
const MAX_LENGTH: u64 = 1024;

/// A secret. `Debug` does not show it, and comparing it with what a client sent takes the same time
/// however much of that is right.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Box<str>);

impl Token {
    /// Reads the token at `path`: one word, surrounded by any white space. Blocks briefly.
    ///
    /// # Errors
    ///
    /// A sentence, if there is no such file, or if its content is no usable secret: everybody can
    /// read the file, or the token can't be sent in a header.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let text = read(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                format!("{shown} does not exist; write a secret into it, and give it mode 0600")
            }
            ErrorKind::PermissionDenied => {
                format!("{shown}: permission denied; let the user that lbd runs as read it")
            }
            _ => format!("{shown} {error}"),
        })?;
        let token = text.trim_ascii();
        if token.is_empty() {
            return Err(format!("{shown} is empty; write a secret into it"));
        }
        if !token.iter().all(u8::is_ascii_graphic) {
            return Err(format!(
                "{shown} holds more than a token; expected one word of letters, digits and signs"
            ));
        }
        Ok(Self(String::from_utf8_lossy(token).into()))
    }

    /// Whether `given` is the token. Takes the same time for all texts of the same length.
    #[must_use]
    pub fn is(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The content of a small file that not everybody can read or change.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let content = file::read(path, MAX_LENGTH, |found| match found.mode() & 0o006 {
        0 => Ok(()),
        _ => Err(io::Error::other("is open to every user; give it mode 0600")),
    });
    content.map_err(|error| match error {
        FileError::Io(error) => error,
        FileError::NotAFile => io::Error::other("is not a file; expected one with a secret in it"),
        FileError::TooLong => {
            io::Error::other(format!("has more than {MAX_LENGTH} bytes; expected a token"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_is_one_word_in_a_file_of_ones_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |content: &[u8], mode: u32| {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            Token::read(&path).map_err(|error| error.replace(path.to_str().unwrap(), "FILE"))
        };
        for content in ["s3cret/+=", " s3cret/+=\n", "s3cret/+=\r\n\n"] {
            let token = read(content.as_bytes(), 0o600).unwrap();
            assert!(token.is("s3cret/+="));
            for wrong in ["", "s3cret/+", "s3cret/+=x", "S3cret/+=", content.trim_end_matches('=')]
            {
                assert!(!token.is(wrong) || wrong == "s3cret/+=", "{wrong:?}");
            }
        }
        assert!(read(b"x", 0o640).is_ok(), "a group may share it");
        let many = "x".repeat(1025);
        let refused: [(&[u8], u32, &str); 7] = [
            (b"", 0o600, "FILE is empty; write a secret into it"),
            (b" \n", 0o600, "FILE is empty; write a secret into it"),
            (b"x", 0o604, "FILE is open to every user; give it mode 0600"),
            (b"x", 0o602, "FILE is open to every user; give it mode 0600"),
            (
                b"two words",
                0o600,
                "FILE holds more than a token; expected one word of letters, digits and signs",
            ),
            (
                "gehe\u{ef}m".as_bytes(),
                0o600,
                "FILE holds more than a token; expected one word of letters, digits and signs",
            ),
            (many.as_bytes(), 0o600, "FILE has more than 1024 bytes; expected a token"),
        ];
        for (content, mode, message) in refused {
            assert_eq!(read(content, mode), Err(message.to_owned()));
        }
        fs::remove_file(&path).unwrap();
        let missing = Token::read(&path).unwrap_err();
        assert!(
            missing
                .ends_with("token does not exist; write a secret into it, and give it mode 0600")
        );
        let folder = Token::read(folder.path()).unwrap_err();
        assert!(folder.ends_with(" is not a file; expected one with a secret in it"), "{folder}");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert!(Token::read(&path).unwrap_err().contains("is not a file"));
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", Token("s3cret".into())), "Token(…)");
    }
}
