# A guest that waits: says so, then answers every byte on the serial line with "[" byte+'@' "]".
# Entered like a Linux vmlinux: 64-bit mode, low 4 GiB identity-mapped.

        .set    COM1, 0x3f8

        .text
        .globl  _start
_start:
        lea     idle(%rip), %rsi
1:      lodsb
        test    %al, %al
        jz      2f
        call    putc
        jmp     1b

2:      pause
        mov     $(COM1 + 5), %dx
        in      %dx, %al
        test    $1, %al
        jz      2b
        mov     $COM1, %dx
        in      %dx, %al
        add     $'@', %al
        mov     %al, %bl
        mov     $'[', %al
        call    putc
        mov     %bl, %al
        call    putc
        mov     $']', %al
        call    putc
        jmp     2b

# Prints AL.
putc:
        mov     $COM1, %dx
        out     %al, %dx
        ret

idle:   .asciz "idle\r\n"
