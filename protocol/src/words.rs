//! What a guest says, on its way into logs and to terminals: it may say anything.

/// Most characters of one line that are told.
const MOST: usize = 2048;

/// On one line, without control characters, and no longer than fits into a log.
pub fn one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MOST).map(shown).collect()
}

/// What a terminal does not obey of these bytes: all but control characters, of which the ends of lines and
/// tabulators stay. What is no UTF-8 is shown as such: some terminals obey single bytes beyond ASCII.
pub fn disarm(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let shown = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().filter(shown).collect()
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
        let said = disarm(b"\x1b]52;c;bHM=\x07one\r\n\ttwo \xc3\xa4\x7f\x00\xc2\x9b2J\x9b2J");
        assert_eq!(said, "]52;c;bHM=one\n\ttwo ä2J\u{fffd}2J");
    }
}
