//! Splits a stream of arbitrary bytes into lines of text.

use std::collections::VecDeque;

use crate::printable;

/// The longest line, in bytes. A longer one is split.
pub(super) const LONGEST: usize = 64 * 1024;

/// If a long line made the buffer grow beyond this, the buffer is shrunk afterwards.
const KEPT: usize = 8 * 1024;

/// Splits a stream of bytes into lines. Buffers no more than one line.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Takes the next piece of the stream. Calls `emit` with each complete line, and with `true` if
    /// it ended only because the line got too long.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut emit: impl FnMut(&[u8], bool)) {
        while !bytes.is_empty() {
            // One byte more than the longest line: its newline.
            let room = LONGEST + 1 - self.begun.len();
            let piece = &bytes[..room.min(bytes.len())];
            if let Some(end) = piece.iter().position(|&byte| byte == b'\n') {
                bytes = &bytes[end + 1..];
                if self.begun.is_empty() {
                    emit(without_return(&piece[..end]), false);
                } else {
                    self.begun.extend_from_slice(&piece[..end]);
                    emit(without_return(&self.begun), false);
                    self.begun.clear();
                    self.begun.shrink_to(KEPT);
                }
                continue;
            }
            bytes = &bytes[piece.len()..];
            self.begun.extend_from_slice(piece);
            if self.begun.len() > LONGEST {
                let end = whole_characters(&self.begun[..LONGEST]);
                emit(&self.begun[..end], true);
                self.begun.drain(..end);
            }
        }
    }

    /// Ends the stream: an unfinished line counts as a line.
    pub(super) fn end(self, mut emit: impl FnMut(&[u8], bool)) {
        if !self.begun.is_empty() {
            emit(without_return(&self.begun), false);
        }
    }
}

/// How many lines [`LastLines`] keeps …
const LAST_LINES: usize = 20;
/// … and how many bytes of them together.
const LAST_BYTES: usize = 4 * 1024;

/// The last lines of some output, converted by [`text`].
#[derive(Debug, Default)]
pub(super) struct LastLines {
    lines: VecDeque<String>,
    bytes: usize,
}

impl LastLines {
    /// Takes the next line. Only the beginning of a long line is kept.
    pub(super) fn add(&mut self, line: &[u8]) {
        let mut line = text(&line[..line.len().min(LAST_BYTES)]);
        line.truncate(line.floor_char_boundary(LAST_BYTES));
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > LAST_LINES || self.bytes > LAST_BYTES {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }

    /// Oldest first.
    pub(super) fn all(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}

/// Makes `line` harmless for a terminal and keeps it on one line: invalid UTF-8 becomes U+FFFD, and
/// a control character becomes its picture (U+2400 …): `␛[31m`.
pub(super) fn text(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    printable::line(&text).into_owned()
}

fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// The length of `bytes` without an incomplete character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    for (back, byte) in (1..=3).zip(bytes.iter().rev()) {
        let length = match byte {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if length > back { bytes.len() - back } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<(Vec<u8>, bool)> {
        let mut all = Vec::new();
        let mut lines = Lines::default();
        for piece in pieces {
            lines.feed(piece, |line, split| all.push((line.to_vec(), split)));
        }
        lines.end(|line, split| all.push((line.to_vec(), split)));
        all
    }

    #[test]
    fn lines_are_put_together_from_pieces_and_the_last_needs_no_newline() {
        let whole = |text: &str| (text.as_bytes().to_vec(), false);
        assert_eq!(
            lines(&[b"a\nb", b"c\r\n", b"\nd", b"e"]),
            [whole("a"), whole("bc"), whole(""), whole("de")]
        );
        assert_eq!(lines(&[b"a\n"]), [whole("a")]);
        assert_eq!(lines(&[]), []);
    }

    #[test]
    fn a_long_line_is_split_between_characters_and_says_so() {
        let longest = vec![b'x'; LONGEST];
        assert_eq!(lines(&[&longest, b"\n"]), [(longest.clone(), false)]);

        let mut longer = vec![b'x'; LONGEST - 1];
        longer.extend("é!".as_bytes());
        assert_eq!(
            lines(&[&longer]),
            [(vec![b'x'; LONGEST - 1], true), ("é!".as_bytes().to_vec(), false)]
        );
    }

    #[test]
    fn text_is_harmless_whatever_the_bytes() {
        assert_eq!(text(b"\x1b[31mred\x1b[0m\tok\0\x7f"), "␛[31mred␛[0m\tok␀␡");
        assert_eq!(text(b"caf\xc3\xa9 \xff \xc2\x9b"), "café \u{fffd} \u{fffd}");
        assert_eq!(text("safe\u{202e}exe\u{2066}".as_bytes()), "safe\u{fffd}exe\u{fffd}");
    }

    #[test]
    fn the_last_lines_are_few_short_and_harmless() {
        let mut last = LastLines::default();
        assert!(last.all().is_empty());
        for number in 0..30 {
            last.add(format!("line {number}\x1b[2J").as_bytes());
        }
        let expected: Vec<_> = (10..30).map(|number| format!("line {number}␛[2J")).collect();
        assert_eq!(last.all(), expected);
        // A control character takes more room as a picture.
        last.add(&[0; LAST_BYTES]);
        assert_eq!(last.all().len(), 1, "there is no room for another");
        assert!(last.bytes <= LAST_BYTES && last.all()[0].starts_with('␀'));
        last.add(b"the end");
        assert_eq!(last.all(), ["the end"]);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_and_no_line_too_long(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20_000), 0..6)
        ) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let mut joined = Vec::new();
            for (line, split) in lines(&pieces) {
                prop_assert!(line.len() <= LONGEST);
                joined.extend(line);
                if !split {
                    joined.push(b'\n');
                }
            }
            let mut expected = pieces.concat();
            if !expected.is_empty() && !expected.ends_with(b"\n") {
                expected.push(b'\n');
            }
            let plain = |bytes: &[u8]| -> Vec<u8> {
                bytes.iter().copied().filter(|&byte| byte != b'\r').collect()
            };
            prop_assert_eq!(plain(&joined), plain(&expected));
        }
    }
}
