//! As much of Rust's grammar as counting lines takes.

/// A function's name and how many lines it has, from `fn` to the closing brace.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    pub(super) lines: usize,
}

/// The text with blanks for what comments and literals hold, so that brackets in it are the code's.
pub(super) fn without_texts(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = text_at(rest, code.chars().last());
        let (taken, tail) = match length {
            0 => {
                code.push(first);
                (first.len_utf8(), true)
            }
            length => (length, false),
        };
        if !tail {
            let blank = |letter| if letter == '\n' { '\n' } else { ' ' };
            code.extend(rest[..taken].chars().map(blank));
        }
        rest = &rest[taken..];
    }
    code
}

/// Length of the comment or literal that `rest` starts with; 0 if it starts with neither. `before`
/// is the character in front of it.
fn text_at(rest: &str, before: Option<char>) -> usize {
    let is_word = before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if let Some(hashes) = raw_string(rest).filter(|_| !is_word) {
        let end = format!("\"{}", "#".repeat(hashes));
        let start = rest.find('"').map_or(0, |at| at + 1);
        return rest[start..]
            .find(&end)
            .map_or(rest.len(), |at| start + at + end.len());
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    if rest.starts_with('\'') {
        character(rest)
    } else {
        0
    }
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        match &rest.as_bytes()[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    rest.len()
}

/// How many hashes a raw string has that starts here.
fn raw_string(rest: &str) -> Option<usize> {
    let rest = rest.strip_prefix('b').unwrap_or(rest);
    let rest = rest.strip_prefix('c').unwrap_or(rest).strip_prefix('r')?;
    let text = rest.trim_start_matches('#');
    text.starts_with('"').then(|| rest.len() - text.len())
}

/// Length of a literal between `quote` and the next one that no backslash stands before.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, letter) in rest.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            letter if letter == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of a character literal; 0 for a lifetime.
fn character(rest: &str) -> usize {
    let mut letters = rest.chars().skip(1);
    match (letters.next(), letters.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(rest, '\''),
        _ => 0,
    }
}

/// All functions with a body.
pub(super) fn functions(code: &str) -> Vec<Function<'_>> {
    let starts = code.match_indices("fn ").filter(|(at, _)| {
        let before = code[..*at].chars().last();
        before.is_none_or(|letter| !letter.is_alphanumeric() && letter != '_')
    });
    starts.filter_map(|(at, _)| function(&code[at..])).collect()
}

fn function(code: &str) -> Option<Function<'_>> {
    let name = code["fn ".len()..].trim_start();
    let end = name.find(|letter: char| !letter.is_alphanumeric() && !"_$".contains(letter))?;
    if end == 0 {
        return None;
    }
    let mut depth = 0_usize;
    for (at, letter) in code.char_indices() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => {
                depth = depth.checked_sub(1)?;
                if letter == '}' && depth == 0 {
                    let lines = code[..at].matches('\n').count() + 1;
                    let name = &name[..end];
                    return Some(Function { name, lines });
                }
            }
            ';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Lines of `allow` and `expect` attributes that give no reason.
pub(super) fn allowances_without_reason(code: &str) -> Vec<usize> {
    let attributes = ["#[allow(", "#![allow(", "#[expect(", "#![expect("];
    let mut lines: Vec<usize> = attributes
        .iter()
        .flat_map(|attribute| code.match_indices(attribute))
        .filter(|(at, _)| {
            let end = code[*at..].find(']').unwrap_or_default();
            !code[*at..*at + end].contains("reason =")
        })
        .map(|(at, _)| code[..at].matches('\n').count() + 1)
        .collect();
    lines.sort_unstable();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_in_texts_do_not_count() {
        let text = "fn a<'l>(x: &'l str) -> char {\n    // }\n    /* { /* } */ */\n    \
                    let _ = (\"}\\\"}\", r#\"}\"}\"#, b\"}\", br\"}\", '}', '\\'', '\\u{7d}');\n    '{'\n}\n";
        let code = without_texts(text);
        assert_eq!(code.lines().count(), text.lines().count());
        let expected = Function {
            name: "a",
            lines: 6,
        };
        assert_eq!(functions(&code), [expected]);
    }

    #[test]
    fn only_functions_with_a_body_count() {
        let code = "trait T { fn a(); fn b(x: [u8; 4]) -> u8 { x[0] } }\ntype F = fn(u8);\n\
                    unsafe extern \"C\" fn c() {\n}\n";
        let names: Vec<&str> = functions(code).iter().map(|f| f.name).collect();
        assert_eq!(names, ["b", "c"]);
    }
}
