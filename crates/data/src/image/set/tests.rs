use serde_json::json;

use super::*;

fn transform() -> Transform {
    Transform::read(Path::new("p.json"), &json!({"do_resize": false}), 1, [1, 2]).unwrap()
}

fn save(path: &Path, values: [u8; 2]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), 2, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.write_header().unwrap().write_image_data(&values).unwrap();
}

fn open(path: &Path) -> Result<ImageSet> {
    ImageSet::open(path, transform(), None, &SetOptions::default())
}

#[test]
fn a_folder_of_folders_gives_classes_by_name() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("dog/1.png"), [1, 2]);
    save(&folder.path().join("cat/b.PNG"), [3, 4]);
    save(&folder.path().join("cat/a.png"), [5, 6]);
    std::fs::write(folder.path().join("cat/notes.md"), "x").unwrap();
    let set = open(folder.path()).unwrap();
    assert_eq!(set.labels(), Some(&Labels::Classes(vec!["cat".into(), "dog".into()])));
    let found: Vec<_> =
        (0..3).map(|i| (set.picture(i).unwrap().values, set.class(i).unwrap())).collect();
    assert_eq!(found, [(vec![5, 6], 0), (vec![3, 4], 0), (vec![1, 2], 1)]);
    assert!(set.statement().contains("1 entries"), "{}", set.statement());
    // 5 / 255 · 2 - 1
    assert_eq!(set.transform().numbers(&set.picture(0).unwrap())[0], -0.960_784_3);
}

#[test]
fn a_broken_picture_is_named_or_skipped() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("a/1.png"), [1, 2]);
    std::fs::write(folder.path().join("a/2.jpg"), b"\xff\xd8 no more").unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("2.jpg"), "{error}");
    let options = SetOptions { skip_broken: true, ..SetOptions::default() };
    let set = ImageSet::open(folder.path(), transform(), None, &options).unwrap();
    assert_eq!((set.len(), set.num_broken()), (1, 1));
    let empty = tempfile::tempdir().unwrap();
    assert!(open(empty.path()).unwrap_err().to_string().contains("named after it"));
}

#[test]
fn rows_name_pictures_with_texts_or_labels() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("p/1.png"), [1, 2]);
    let rows = folder.path().join("rows.jsonl");
    let write = |text: &str| std::fs::write(&rows, text).unwrap();
    write("{\"image\": \"p/1.png\", \"text\": \"a dog\"}\n");
    let set = open(&rows).unwrap();
    assert_eq!((set.text(0), set.class(0), set.labels()), (Some("a dog"), None, None));
    write("{\"image\": \"p/1.png\", \"label\": \"dog\"}\n");
    assert_eq!(open(&rows).unwrap().class(0), Some(0));
    for (text, part) in [
        ("{\"text\": \"a dog\"}\n", "`image`"),
        ("{\"image\": \"p/1.png\"}\n", "a label or a text"),
        ("{\"image\": \"p/1.png\", \"text\": \"a\", \"label\": 1}\n", "a label or a text"),
        ("{\"image\": \"p/2.png\", \"label\": 1}\n", "2.png"),
        (
            "{\"image\": \"p/1.png\", \"text\": \"a\"}\n{\"image\": \"p/1.png\", \"label\": 1}\n",
            "line 2",
        ),
    ] {
        write(text);
        let error = open(&rows).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn several_packed_files_are_one_set_with_named_classes() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, label: u8| {
        let record: Vec<u8> = std::iter::once(label).chain([label; 3072]).collect();
        std::fs::write(folder.path().join(name), record).unwrap();
    };
    write("train_1.bin", 1);
    write("train_2.bin", 0);
    write("test.bin", 1);
    std::fs::write(folder.path().join("classes.txt"), "air\nboat\n").unwrap();
    let transform =
        Transform::read(Path::new("p.json"), &json!({"do_resize": false}), 3, [32, 32]).unwrap();
    let all = |name: &str| {
        let path = folder.path().join(name);
        ImageSet::open(&path, transform.clone(), None, &SetOptions::default())
    };
    let set = all("train_*.bin").unwrap();
    assert_eq!((set.class(0), set.class(1), set.len()), (Some(1), Some(0), 2));
    assert_eq!(set.labels(), Some(&Labels::Classes(vec!["air".into(), "boat".into()])));
    assert!(all("valid_*.bin").unwrap_err().to_string().contains("no file"));
}
