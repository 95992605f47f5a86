//! Makes text from outside safe to show.
//!
//! A path, a program's output or another process's answer may contain anything. A terminal obeys
//! control characters as commands (ECMA-48), and a bidirectional control makes text read as
//! something that it is not (UAX #9; "Trojan Source", CVE-2021-42574). Everything from outside that
//! lbd prints or logs goes through one of these functions.

use std::{borrow::Cow, fmt::Write as _};

/// Whether a terminal or a reader could be misled by `c`: C0 and C1 controls, line and paragraph
/// separators, and marks that change the direction of text.
#[must_use]
pub fn is_control(c: char) -> bool {
    matches!(c,
        '\0'..='\x1f'
        | '\x7f'..='\u{9f}'
        | '\u{61c}'
        | '\u{200e}'
        | '\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}')
}

/// `text` on one line, without anything that a terminal obeys: a C0 control becomes its picture
/// (U+2400 …), as in `␛[31m`, and any other U+FFFD. Tabs stay.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    match text.contains(|c| is_control(c) && c != '\t') {
        true => Cow::Owned(text.chars().map(picture).collect()),
        false => Cow::Borrowed(text),
    }
}

/// The same for text that may have several lines.
#[must_use]
pub fn lines(text: &str) -> Cow<'_, str> {
    let shown = |c| if c == '\n' { c } else { picture(c) };
    match text.contains(|c| is_control(c) && !matches!(c, '\t' | '\n')) {
        true => Cow::Owned(text.chars().map(shown).collect()),
        false => Cow::Borrowed(text),
    }
}

/// JSON with every such character escaped (allowed by RFC 8259, 7): its meaning is unchanged. Line
/// breaks between values stay.
#[must_use]
pub fn json(text: &str) -> Cow<'_, str> {
    // Outside of strings JSON contains no other controls, and inside of strings no line breaks.
    let is_escaped = |c| is_control(c) && !matches!(c, '\n' | '\r' | '\t');
    if !text.contains(is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_escaped(c) {
            // Each is a single UTF-16 unit. Writing to a String does not fail.
            true => _ = write!(escaped, "\\u{:04x}", u32::from(c)),
            false => escaped.push(c),
        }
    }
    Cow::Owned(escaped)
}

fn picture(c: char) -> char {
    match c {
        '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).unwrap_or_default(),
        '\x7f' => '\u{2421}',
        // The fast path: most characters are printable ASCII.
        ' '..='\x7e' => c,
        _ if is_control(c) => char::REPLACEMENT_CHARACTER,
        _ => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each is obeyed by a terminal, or turns text around.
    const BAD: &str = "\0\x07\x08\r\x0b\x0c\x1b\x7f\u{80}\u{85}\u{9b}\u{9f}\u{61c}\u{200e}\u{200f}\
        \u{2028}\u{2029}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}";

    #[test]
    fn all_that_unicode_calls_a_control_is_one() {
        assert!(('\0'..=char::MAX).all(|c| is_control(c) || !c.is_control()));
    }

    #[test]
    fn nothing_that_is_obeyed_is_left() {
        for bad in BAD.chars().filter(|c| *c != '\r') {
            let text = format!("a{bad}b");
            for shown in [line(&text), lines(&text), json(&text)] {
                assert!(!shown.contains(is_control), "{bad:?}: {shown:?}");
                assert!(shown.starts_with('a') && shown.ends_with('b'));
            }
        }
        assert!(!line("a\r\nb").contains(is_control) && !lines("a\rb").contains('\r'));
    }

    #[test]
    fn a_control_is_shown_by_its_picture() {
        assert_eq!(line("\x1b[31mred\x1b[0m\tok\0\x7f\n"), "␛[31mred␛[0m\tok␀␡␊");
        assert_eq!(lines("a\nb\u{202e}\u{9b}"), "a\nb\u{fffd}\u{fffd}");
        for plain in ["", "naïve 日本語 ✓", "a\tb", "e\u{301}"] {
            assert!(matches!(line(plain), Cow::Borrowed(same) if same == plain));
        }
    }

    #[test]
    fn json_means_the_same() {
        let text = format!("x{BAD}é\u{10ffff}\"\\\n");
        for written in [serde_json::to_string(&text), serde_json::to_string_pretty(&[&text])] {
            let written = written.unwrap();
            let escaped = json(&written);
            assert!(!escaped.contains(|c| is_control(c) && c != '\n'), "{escaped}");
            let meant: serde_json::Value = serde_json::from_str(&escaped).unwrap();
            assert_eq!(meant, serde_json::from_str::<serde_json::Value>(&written).unwrap());
        }
    }
}
