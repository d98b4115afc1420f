//! What a guest says, on its way into logs and to terminals: it may say anything.

/// Most characters of one line that are told.
const MOST: usize = 2048;

/// On one line, without control characters, and no longer than fits into a log.
pub fn one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MOST).map(shown).collect()
}

/// Takes from bytes what a terminal would obey: all control characters of ASCII but for the ends of lines and
/// tabulators. Those of Unicode are two bytes in UTF-8, of which terminals obey none.
pub fn disarm(bytes: &mut Vec<u8>) {
    bytes.retain(|byte| !byte.is_ascii_control() || matches!(byte, b'\n' | b'\t'));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_and_short() {
        assert_eq!(one_line("a\nlevel=error\r\u{9b}2J"), "a level=error  2J");
        assert_eq!(one_line(&"ä".repeat(3000)).chars().count(), MOST);
    }

    #[test]
    fn a_terminal_obeys_nothing_of_what_is_left() {
        let mut bytes = b"\x1b]52;c;bHM=\x07one\r\n\ttwo \xc3\xa4\x7f\x00".to_vec();
        disarm(&mut bytes);
        assert_eq!(bytes, b"]52;c;bHM=one\n\ttwo \xc3\xa4");
    }
}
