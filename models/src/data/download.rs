//! Files fetched from a list of mirrors, checked by SHA-256 and put in place in one step. Without a network it gives up
//! within seconds, since what comes after it (generated data) always works. The mirrors are asked by plain HTTP: the hash vouches
//! for the content, and no build has to carry a TLS library.

use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

/// To find the server, and again to reach it: long for any network that works, short for one who waits without one.
const CONNECT: Duration = Duration::from_secs(3);
/// From the request to the first byte of the answer.
const ANSWER: Duration = Duration::from_secs(5);
/// For a whole file of the MNIST family (26 MB at most).
const WHOLE: Duration = Duration::from_secs(120);

/// A file to fetch.
pub(super) struct Remote {
    /// The name, the same on every mirror and on the disk.
    pub name: &'static str,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: &'static str,
    /// The content's size in bytes; reading stops there.
    pub bytes: u64,
}

/// Fetches `file` into `folder` from the first of `mirrors` (each ends in `/`) that gives the right bytes.
///
/// # Errors
/// If no mirror does, or `folder` cannot be written.
pub(super) fn fetch(file: &Remote, mirrors: &[&str], folder: &Path) -> Result<()> {
    let mut last = Error::argument("download", format!("there is no mirror for {}", file.name));
    for mirror in mirrors {
        let url = format!("{mirror}{}", file.name);
        match get(&url, file) {
            Ok(content) => {
                let path = folder.join(file.name);
                return write_atomic(&path, |out| out.write_all(&content).map_err(|e| Error::io("download", path.display(), e)));
            }
            Err(problem) => last = Error::new(ErrorKind::Io, "download", format!("{url}: {problem}")),
        }
    }
    Err(last)
}

/// The bytes at `url`, if they are the right ones.
fn get(url: &str, file: &Remote) -> std::result::Result<Vec<u8>, String> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(ANSWER))
        .timeout_global(Some(WHOLE))
        .build()
        .into();
    let answer = agent.get(url).call().map_err(|e| e.to_string())?;
    let mut content = Vec::new();
    // One byte more than expected is enough to know that it is another file.
    answer.into_body().into_reader().take(file.bytes + 1).read_to_end(&mut content).map_err(|e| e.to_string())?;
    if content.len() as u64 != file.bytes || !matches(&content, file.sha256) {
        return Err(format!("the content is not the expected one ({} bytes, expected {})", content.len(), file.bytes));
    }
    Ok(content)
}

/// Whether SHA-256 of `content` is `expected` (hexadecimal).
fn matches(content: &[u8], expected: &str) -> bool {
    let digest: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    digest == expected
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::net::TcpListener;

    /// A server on this machine that answers each of `answers` once; its address.
    fn serve(answers: Vec<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for content in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).unwrap();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", content.len());
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(&content).unwrap();
            }
        });
        address
    }

    /// SHA-256 of "abc", from FIPS 180-2.
    const ABC: Remote = Remote { name: "abc", sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", bytes: 3 };

    #[test]
    fn takes_the_first_mirror_with_the_right_content() {
        let folder = std::env::temp_dir().join(format!("kiln-download-{}", std::process::id()));
        let wrong = serve(vec![b"abd".to_vec(), b"abcd".to_vec()]);
        let right = serve(vec![b"abc".to_vec()]);
        fetch(&ABC, &[&wrong, &wrong, "http://127.0.0.1:1/", &right], &folder).unwrap();
        assert_eq!(fs::read(folder.join("abc")).unwrap(), b"abc");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn says_why_no_mirror_would_do() {
        let wrong = serve(vec![b"abd".to_vec()]);
        let error = fetch(&ABC, &["http://127.0.0.1:1/", &wrong], Path::new("unused")).unwrap_err().to_string();
        assert!(error.contains("abc: the content is not the expected one"), "{error}");
        assert!(!Path::new("unused").exists());
    }
}
