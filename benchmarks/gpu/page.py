def write_pages(rows): pass
